"""Training: from examples to adapters, many in one pass. Knows the base and the bank; knows no serving."""
