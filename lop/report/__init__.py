"""What was measured, told: benchmark, intervals, comparison, tables, plots.

May import all rooms but `stages`.
"""
