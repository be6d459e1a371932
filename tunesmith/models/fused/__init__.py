"""Autograd functions that stand in for pieces of a decoder layer: the same numbers, fewer passes over memory.

Each file holds one piece as pure functions of tensors; tunesmith/models/fuse.py puts them under a model.
"""
