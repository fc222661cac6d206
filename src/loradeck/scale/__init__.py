"""A server of many replicas, by Ray Serve: an engine in each, and requests sent to where their adapter is."""
