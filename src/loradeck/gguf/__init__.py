"""Bases, merged models and adapters as GGUF files of llama.cpp: weights, settings and vocabulary."""
