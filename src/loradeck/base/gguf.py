"""A base from a GGUF file. The user's cache folder keeps its tokenizer, and its model where it is de-quantised."""

import hashlib
import io
import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loradeck.base.digest import DigestCache, sha256
from loradeck.base.gguf_config import config_of, why_no_config
from loradeck.base.gguf_file import GgufFile, parts
from loradeck.base.gguf_model import read_model, why_not_in_blocks
from loradeck.base.pretrained import base_errors, pretrained_model, pretrained_tokenizer, quiet
from loradeck.disk import cache_folder, new_folder
from loradeck.errors import BaseModelError

CHECKSUMS = "SHA256SUMS"
HINT = "Give a complete GGUF file of a decoder-only model; set LORADECK_CACHE to a disk with free space."

log = logging.getLogger(__name__)


def read_in_blocks(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """Return the model of a GGUF file in the file's own blocks, and its tokenizer; None if it must be de-quantised.

    Raises:
        BaseModelError: the file cannot be read.
    """
    _check_packages(path, "gguf")
    with GgufFile(path) as file:
        reason = why_no_config(file) or why_not_in_blocks(file)
        if reason:
            log.info("%s is de-quantised: %s", path, reason)
            return None
        config, folder = config_of(file), _tokenizer_folder(file)
        with ThreadPoolExecutor(1) as pool:  # most of both is computed outside Python
            tokenizer = pool.submit(pretrained_tokenizer, path, str(folder))
            return read_model(file, config, dtype, in_blocks=True), tokenizer.result()


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a GGUF file.

    Raises:
        BaseModelError: the file cannot be read.
    """
    _check_packages(path, "gguf")
    with GgufFile(path) as file:
        if why_no_config(file) is None:
            return _tokenizer(file)
    return pretrained_tokenizer(path, str(dequantised_folder(path)))


def dequantised_folder(path: Path) -> Path:
    """Return the cache folder with the model and tokenizer of a GGUF file, filling it on first use.

    The weights are stored in bf16: half the bytes of fp32, at an error (2^-9) below that of the quantisation it undoes
    (6e-5 nats per token on SmolLM2), and loads in fp32 and bf16 have the same values.

    Raises:
        BaseModelError: the file cannot be read, or is no decoder-only model.
    """

    def fill(fresh: Path) -> None:
        _check_packages(path, "gguf")
        log.info("dequantising %s into %s, once", path, cache_folder())
        # A bar of tqdm cannot be turned off.
        with GgufFile(path) as file, quiet(), redirect_stderr(io.StringIO()):
            if why_no_config(file):
                _check_packages(path, "accelerate")
                _dequantise_by_transformers(path, fresh)
            else:
                _tokenizer(file).save_pretrained(fresh)
                read_model(file, config_of(file), torch.bfloat16, in_blocks=False).save_pretrained(fresh)

    with base_errors(path, HINT):
        digests = DigestCache(cache_folder() / "digests.json")
        each = [digests.of(part) for part in parts(path) if part.is_file()]
        digest = each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()
        return _cached(f"{digest}-bf16", digests, fill)


def _tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    return pretrained_tokenizer(file.path, str(_tokenizer_folder(file)))


def _tokenizer_folder(file: GgufFile) -> Path:
    """Return the cache folder with a file's tokenizer, filling it on first use.

    The key is the file's header, so that neither its vocabulary nor all its bytes are read again.
    """

    def fill(fresh: Path) -> None:
        with TemporaryDirectory() as alone:
            (Path(alone) / "base.gguf").write_bytes(file.metadata)
            # AutoTokenizer would read the vocabulary a second time, for a configuration: nine seconds of ten.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file="base.gguf")
        tokenizer.save_pretrained(fresh)
        _list_added_tokens(tokenizer, fresh / "tokenizer_config.json")

    with base_errors(f"the tokenizer of {file.path}", HINT):
        return _cached(f"{file.digest}-tokenizer-2", DigestCache(cache_folder() / "digests.json"), fill)


def _list_added_tokens(tokenizer: PreTrainedTokenizerBase, settings: Path) -> None:
    """Write the added tokens into a tokenizer_config.json, as transformers 4 did.

    Otherwise transformers reads tokenizer.json in Python for them alone, each time: 1.5 s and 250 MB for Gemma 3.
    """
    tokens = {number: token.__getstate__() for number, token in sorted(tokenizer.added_tokens_decoder.items())}
    content = {**json.loads(settings.read_text(encoding="utf-8")), "added_tokens_decoder": tokens}
    settings.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _check_packages(path: Path, *packages: str) -> None:
    if missing := [name for name in packages if find_spec(name) is None]:
        raise BaseModelError(
            f"{path}: reading a GGUF file needs {' and '.join(missing)}", hint="Run pip install 'loradeck[gguf]'."
        )


def _dequantise_by_transformers(path: Path, fresh: Path) -> None:
    if len(parts(path)) > 1:
        raise BaseModelError(f"{path} is one of several parts", hint="Join them with llama.cpp's llama-gguf-split.")
    with TemporaryDirectory() as alone:  # transformers would also read other files next to the GGUF
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
