"""The server that trains: its files and jobs, and training between the steps of an engine."""
