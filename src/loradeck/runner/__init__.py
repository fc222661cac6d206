"""One step of a model for a batch of rows, each through its own adapters."""
