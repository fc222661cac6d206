"""Adapters on any nn.Module: what they are, where they sit, which rows go through them. Knows no language model."""
