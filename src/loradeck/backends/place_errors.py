"""What goes wrong at a place elsewhere, as one error that says what to do."""

import errno

from loradeck.errors import AdapterError, LoradeckError, StoreUnreachableError

NO_RETRY = (
    LoradeckError,
    PermissionError,
    FileNotFoundError,
    FileExistsError,
    NotImplementedError,
    ValueError,
    TypeError,
)
NO_RETRY_NUMBERS = {errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES}
SETTINGS = ("Credential", "Profile", "ParamValidation", "NoRegion", "UnknownEndpoint")  # in names of botocore's errors
SHOWN = 300  # characters of another library's message


class CutOffError(OSError):
    """An answer was shorter than what was asked for."""


def _may_pass(error: Exception) -> bool:
    """Return whether the same call may succeed a moment later."""
    if isinstance(error, NO_RETRY) or _is_setting(error) or _is_forbidden(error):
        return False
    return getattr(error, "errno", None) not in NO_RETRY_NUMBERS


def place_error(url: str, error: Exception) -> LoradeckError:
    """Return the error of a call that failed, for the place at `url`."""
    if isinstance(error, LoradeckError):
        return error
    code, text = _code(error), _text(error)
    if code == "RequestTimeTooSkewed":
        hint = "Set the clock of this machine: it may be wrong by 15 minutes at most."
        return AdapterError(f"{url} refuses the request, because this machine's clock is wrong: {text}", hint=hint)
    if isinstance(error, FileNotFoundError):
        return AdapterError(f"{url} is not there: {text}", hint="Create the bucket or repository, or check its name.")
    if _is_forbidden(error):
        hint = "Check the credentials and what they permit: see docs/store.md, A store elsewhere."
        return AdapterError(f"{url} does not permit it: {text}", hint=hint)
    if _is_setting(error):
        hint = "Set the usual environment variables or files: see docs/store.md, A store elsewhere."
        return AdapterError(f"{url} cannot be asked: {text}", hint=hint)
    if _may_pass(error):
        return StoreUnreachableError(f"{url} does not answer, or fails: {text}", hint="Try again later.")
    return AdapterError(f"{url} refuses the request: {text}")


def _is_setting(error: Exception) -> bool:
    return any(part in type(error).__name__ for part in SETTINGS)


def _is_forbidden(error: Exception) -> bool:
    return isinstance(error, PermissionError) or str(error).startswith("Forbidden")  # gcsfs raises a plain OSError


def _code(error: BaseException | None) -> str:
    """Return S3's code of an error; "" if it has none."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict) and isinstance(response.get("Error"), dict):
            return str(response["Error"].get("Code", ""))
        error = error.__cause__
    return ""


def _text(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:SHOWN]
