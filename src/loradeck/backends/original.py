"""A PEFT folder that is to be published: read completely before, compared after it is copied."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from loradeck.errors import AdapterError
from loradeck.lora.folder import CARD
from loradeck.lora.manifest import read_folder, stamp
from loradeck.stored import digest_of, files_of
from loradeck.tokenizer_files import TokenizerFiles


@dataclass(frozen=True)
class Original:
    """A folder, and the identity of its files when they were read."""

    folder: Path
    files: tuple[str, ...]
    """Those that decide what the adapter computes."""
    sha256: str
    tokenizer: TokenizerFiles

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read an adapter completely.

        Raises:
            AdapterError, UnsupportedError: it cannot be loaded.
        """
        from loradeck.lora.adapter import Adapter

        listing = read_folder(folder)
        files = files_of(listing)
        digest = digest_of(folder, files)
        Adapter.from_files(listing, check_copy=lambda *_: None)  # only a bank can compare copies with its base
        return cls(folder, tuple(files), digest, TokenizerFiles.of(folder, stamp(folder)))

    def copy_to(self, new: Path) -> None:
        """Copy the adapter's own files into a folder.

        Raises:
            AdapterError: they have changed since they were read.
        """
        card = [CARD] if (self.folder / CARD).is_file() else []
        for file in [*self.files, *card, *self.tokenizer.names]:
            shutil.copyfile(self.folder / file, new / file)
        tokenizer = TokenizerFiles.of(self.folder, stamp(self.folder))
        if digest_of(new, self.files) != self.sha256 or tokenizer != self.tokenizer:
            raise AdapterError(f"{self.folder} was changed while it was read", hint="Publish it again.")
