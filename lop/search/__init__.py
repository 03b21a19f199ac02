"""Evaluations and how they are spent: evaluator, races, tree, loop, ledger, scan, progress.

May import `space`, `storage` and `model`.
"""
