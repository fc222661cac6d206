"""Adapters measured side by side on one dataset: their losses and answers, and what these say.

A report is made from losses and answers, wherever they come from: a bank in this process, or a server's engine.
"""
