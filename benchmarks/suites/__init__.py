"""Each suite measures one thing, declares its figures beside it, and writes one result file."""
