"""Datasets: from a file of any common form to tokens and labels. Knows tokenizers and templates; trains nothing."""
