"""Other systems on the same base, adapters and prompts: `python -m benchmarks.peers`, see __main__.py."""
