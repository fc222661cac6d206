"""The soak: thousands of adapters, little room, random requests, and every answer compared with its request alone."""
