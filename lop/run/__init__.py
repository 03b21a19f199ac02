"""A run: its settings, and the folder that holds what the stages make.

May import all rooms but `report`, `stages` and `plugins`.
"""
