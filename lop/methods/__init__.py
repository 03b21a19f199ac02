"""Every other way to prune.

May import `space`, `model` and `search`.
"""
