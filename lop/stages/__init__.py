"""The stages from a model to a pruned checkpoint, each from files to files.

May import all other rooms.
"""
