"""The frozen base: load it, tell it from another, and turn text into its tokens and back. Knows no LoRA."""
