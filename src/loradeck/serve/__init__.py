"""Generations for many requests at once, each through its own adapters, in one batch on one base."""
