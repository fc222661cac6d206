"""A server that trains: jobs in the thread of an engine, between its steps, on one copy of the base."""
