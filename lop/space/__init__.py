"""What can be chosen: allocations, their exact budgets, and targets as users name them.

May import errors alone.
"""
