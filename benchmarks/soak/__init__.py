"""The soak: thousands of adapters, little room, everything at random, and every answer held against itself alone."""
