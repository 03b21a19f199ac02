"""Every way to prune, LOP's own among them: each is one file and one entry of `lop.methods.registry`.

May import `space`, `model` and `search`. The registry names what a config may hold, and has no torch behind it.
"""
