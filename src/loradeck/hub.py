"""The Hugging Face hub: its ids, and what its refusals mean. The client is imported when it is needed."""

TIMEOUT = 5.0  # seconds for the first answer; the client would try for a minute


def is_hub_id(name: str) -> bool:
    """Return whether a name is a hub id, owner/name. A bare name is not: a misspelt folder must not reach the hub."""
    import huggingface_hub.utils as hub

    try:
        hub.validate_repo_id(name)
    except hub.HFValidationError:
        return False
    return "/" in name


def why_refused(hub_id: str, kind: str, error: Exception) -> tuple[str, str] | None:
    """Return the message and the hint for an answer of the hub that says no, None if it did not answer or failed.

    `kind` is what was asked for: a model or an adapter.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return f"{hub_id} is gated", "Accept its terms on its page, and log in: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        hint = "Check its name; to a private one, log in: hf auth login"
        return f"the hub has no {kind} {hub_id}, or does not show it to you", hint
    if isinstance(error, RevisionNotFoundError):
        return f"{hub_id} has no such revision", "Give a branch, a tag or a commit after the @."
    return None


def why_unreachable(error: Exception) -> str:
    """Return why the hub could not be asked, or failed."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    what = "answers with an error" if isinstance(error, HfHubHTTPError) else "cannot be reached"
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} {what}: {reason}"
