"""From a target to an allocation at once: networks, the predictor, its training.

May import `space` and `storage`.
"""
