"""The page that a browser shows at `/`: static files, which talk to the server over its public HTTP API only."""
