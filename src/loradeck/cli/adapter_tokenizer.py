"""The tokenizer and the chat template of an adapter's folder: which files, and how they differ from the base's."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loradeck.cli.display.text import format_size
from loradeck.errors import AdapterError, BaseModelError
from loradeck.lora.manifest import AdapterFiles, stamp
from loradeck.tokenizer_files import TokenizerFiles


@dataclass(frozen=True)
class AdapterTokenizer:
    """What `loradeck show` says of it."""

    files: TokenizerFiles
    base: str | None = None
    """What it was compared with; None if it was not."""
    differences: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    """Why it cannot be used."""

    @classmethod
    def of(cls, listing: AdapterFiles, base: str | None) -> "AdapterTokenizer":
        """Look into an adapter's folder. Its files are compared with `base`, or with the recorded base if that is here.

        Raises:
            BaseModelError: `base` has no tokenizer that can be loaded.
        """
        files = TokenizerFiles.of(listing.folder, stamp(listing.folder))
        recorded = listing.origin.base_model
        source = base or (recorded if recorded and _is_here(recorded) else None)
        if not files.names or source is None:
            return cls(files)

        from loradeck.base.adapter_tokenizer import AdapterTokenizers
        from loradeck.base.load import load_tokenizer
        from loradeck.base.tokenizer_difference import differences

        try:
            theirs = load_tokenizer(source)
            own = AdapterTokenizers(theirs).of([files])
        except AdapterError as error:
            return cls(files, source, error=error.message)
        except BaseModelError:
            if base is None:  # what the adapter names need not be a base
                return cls(files)
            raise
        return cls(files, source, differences(own, theirs))

    @property
    def facts(self) -> dict[str, str]:
        """The lines that show it; none if the folder has no such file."""
        if not self.files.names:
            return {}
        lines = {"tokenizer": f"{', '.join(sorted(self.files.names))} ({format_size(self.files.nbytes)})"}
        if self.error is not None:
            return lines | {"": f"cannot be used: {self.error}"}
        if self.base is None:
            return lines | {"": "give --base BASE to see how it differs from the base's"}
        if not self.differences:
            return lines | {"": f"equal to that of {self.base}"}
        return lines | {f"  other {kind}": text for kind, text in self.differences.items()}

    @property
    def as_json(self) -> dict[str, Any] | None:
        """The same for programs; None if the folder has no such file."""
        if not self.files.names:
            return None
        return {
            "files": sorted(self.files.names),
            "bytes": self.files.nbytes,
            "base": self.base,
            "differences": self.differences,
            "error": self.error,
        }


def _is_here(base: str) -> bool:
    try:
        return Path(base).exists()
    except (OSError, ValueError):
        return False
