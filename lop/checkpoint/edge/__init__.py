"""GGUF, which llama.cpp runs: a pruned checkpoint as a file of the language model and one of the vision tower.

Written by the `gguf` package from tensors read a few rows at a time; nothing of the model is built.
"""
