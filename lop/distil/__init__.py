"""Distillation: a pruned model learns from the dense one.

May import `space`, `storage`, `model`, `search`, `checkpoint` and `run`.
"""
