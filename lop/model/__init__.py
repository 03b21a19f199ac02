"""The model as LOP sees it: families, the lean backbone, the elastic model, samples and their encoding, statistics.

May import `space` and `storage`.
"""
