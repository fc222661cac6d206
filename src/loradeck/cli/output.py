"""A new file or folder that a verb is to write, checked before the seconds that its work takes."""

import tempfile
from pathlib import Path

from loradeck.errors import ConfigError


def check_writable(output: Path) -> None:
    """Check that a file or folder can be made at this path.

    Raises:
        ConfigError: the nearest folder that exists is not writable, or is a file.
    """
    parent = next(parent for parent in output.resolve().parents if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=parent, prefix=".loradeck-").cleanup()
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {parent}: {error.strerror}", hint="Give another place.") from error
