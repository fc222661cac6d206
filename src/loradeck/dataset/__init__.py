"""Datasets: read files of any common form into tokens and labels."""
