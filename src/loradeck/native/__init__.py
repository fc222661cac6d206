"""A whole step of a decoder in one call of C, compiled on the machine: every row through its own adapters.

Knows numbers and pointers: what a model computes is a table (`table`), which others read from a transformers model.
"""
