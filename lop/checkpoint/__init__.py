"""Pruned checkpoints: formats, shards, recovery, export, inspection.

May import `space`, `storage` and `model`.
"""
