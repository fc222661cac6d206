"""Training: from lines of JSON to an adapter. Knows the base and the bank; knows no serving."""
