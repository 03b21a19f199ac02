"""Families of models: each is one file and one entry of `lop.model.families.registry`.

The registry has neither torch nor transformers behind it: what needs them imports them when it is called.
"""
