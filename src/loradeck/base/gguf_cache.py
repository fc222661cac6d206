"""What is made of a GGUF file once and kept in the user's cache folder: its tokenizer, and its de-quantised model."""

import hashlib
import io
import logging
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from loradeck.base.digest import DigestCache, sha256
from loradeck.base.gguf_config import config_of, why_no_config
from loradeck.base.gguf_file import GgufFile, parts
from loradeck.base.gguf_model import read_model
from loradeck.base.pretrained import base_errors, pretrained_model, pretrained_tokenizer, quiet
from loradeck.disk import cache_folder, new_folder
from loradeck.errors import BaseModelError

CHECKSUMS = "SHA256SUMS"
PACKAGES = "gguf", "accelerate"

log = logging.getLogger(__name__)


def tokenizer_folder(file: GgufFile) -> Path:
    """Return the cache folder with a file's tokenizer and chat template, filling it on first use.

    The key is the file's header, so neither its vocabulary nor all its bytes are read again. No weights are stored.

    Raises:
        BaseModelError: the file has no tokenizer that transformers knows.
    """

    def fill(fresh: Path) -> None:
        with TemporaryDirectory() as alone:
            (Path(alone) / "base.gguf").write_bytes(file.metadata)
            # AutoTokenizer reads the vocabulary a second time, for a configuration: nine of ten seconds.
            PreTrainedTokenizerFast.from_pretrained(alone, gguf_file="base.gguf").save_pretrained(fresh)

    with base_errors(f"the tokenizer of {file.path}", "Load another file of this model."):
        return _cached(f"{file.digest}-tokenizer", DigestCache(cache_folder() / "digests.json"), fill)


def dequantised_folder(path: Path) -> Path:
    """Return the cache folder with the model and tokenizer of a GGUF file, filling it on first use.

    The weights are stored in bf16: half the bytes of fp32, at an error (2^-9) below that of the quantisation it undoes
    (6e-5 nats per token on SmolLM2), and loads in fp32 and bf16 have the same values.

    Raises:
        BaseModelError: the file cannot be read, or is no decoder-only model.
    """
    hint = "Give a complete GGUF file of a decoder-only model; set LORADECK_CACHE to a disk with free space."

    def fill(fresh: Path) -> None:
        check_packages(path)
        log.info("dequantising %s into %s, once", path, cache_folder())
        with GgufFile(path) as file, quiet():
            if why_no_config(file):
                _dequantise_by_transformers(path, fresh)
            else:
                model, _ = read_model(file, config_of(file), torch.bfloat16, in_blocks=False)
                model.save_pretrained(fresh)
                pretrained_tokenizer(path, str(tokenizer_folder(file))).save_pretrained(fresh)

    with base_errors(path, hint):
        digests = DigestCache(cache_folder() / "digests.json")
        each = [digests.of(part) for part in parts(path) if part.is_file()]
        digest = each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()
        return _cached(f"{digest}-bf16", digests, fill)


def check_packages(path: Path) -> None:
    """Refuse to read a GGUF file without the packages for it.

    Raises:
        BaseModelError: they are not installed.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise BaseModelError(
            f"{path}: reading a GGUF file needs {' and '.join(missing)}", hint="Run pip install 'loradeck[gguf]'."
        )


def _dequantise_by_transformers(path: Path, fresh: Path) -> None:
    with (
        TemporaryDirectory() as alone,  # transformers would also read other files next to the GGUF
        redirect_stderr(io.StringIO()),  # a tqdm bar that cannot be turned off
    ):
        origin: dict[str, Any] = {"gguf_file": "base.gguf"}
        (Path(alone) / "base.gguf").symlink_to(path.resolve())
        pretrained_tokenizer(path, alone, **origin).save_pretrained(fresh)
        if hasattr(transformers, "GgufConfig"):  # otherwise it may keep them quantised, and could not save them
            origin["quantization_config"] = transformers.GgufConfig(dequantize=True)
        pretrained_model(path, alone, torch.bfloat16, **origin).save_pretrained(fresh)


def _cached(name: str, digests: DigestCache, fill: Callable[[Path], None]) -> Path:
    """Return a folder of the cache; it is filled if it is not there, or its files changed since."""
    folder = digests.path.parent / name
    if not _is_whole(folder, digests):
        if folder.exists():
            shutil.rmtree(folder)
        with new_folder(folder) as fresh:
            fill(fresh)
            sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(fresh.iterdir())]
            (fresh / CHECKSUMS).write_text("".join(sums))
    return folder


def _is_whole(folder: Path, digests: DigestCache) -> bool:
    """Whether the files of a cache folder match the checksums written with them."""
    sums = folder / CHECKSUMS
    if not sums.is_file():
        return False
    files = [line.partition("  ") for line in sums.read_text(errors="replace").splitlines()]
    return bool(files) and all(
        (folder / name).is_file() and digests.of(folder / name) == digest for digest, _, name in files
    )
