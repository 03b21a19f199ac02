"""What other tools load: vLLM, lmms-eval, task files.

May import `model` and `storage`.
"""
