"""Training: from examples to adapters, any number of them in one pass over the base."""
