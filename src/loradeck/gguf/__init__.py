"""Bases and merged models as GGUF files for llama.cpp: weights, settings and vocabulary.

Adapters as GGUF files are in lora/gguf.py.
"""
