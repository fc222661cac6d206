"""Other systems on the same base, adapters and prompts."""
