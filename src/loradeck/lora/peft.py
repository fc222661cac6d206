"""PEFT's adapter_config.json <-> LoraConfig; unsupported settings are refused by name.

The facts are from PEFT 0.21's source; the tests check them against PEFT itself.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec

from loradeck.disk import read_start
from loradeck.errors import AdapterError, ConfigError, UnsupportedError, shorten
from loradeck.lora import foreign
from loradeck.lora.config import LoraConfig
from loradeck.lora.folder import CONFIG, check_lfs, no_adapter
from loradeck.lora.memo import Memo
from loradeck.lora.unsupported import IN_TENSORS, INIT, ORIGIN, REFUSED, RETRAIN, WITHOUT_EFFECT, may_change_results

MAX_CONFIG = 4 << 20  # bytes; enough for one pattern per module of a large model

READ = frozenset(field.name for field in fields(LoraConfig))


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an adapter comes from, as its files say; saved again unchanged."""

    base_model: str | None = None
    revision: str | None = None
    task_type: str | None = None
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    written: Mapping[str, Any] | None = None  # the adapter_config.json as it was read

    @property
    def provenance(self) -> dict[str, str]:
        """loradeck's own metadata (base fingerprint, hashes, versions), from the safetensors file."""
        try:
            record = msgspec.json.decode(self.metadata.get("loradeck", "{}"), type=dict[str, object])
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return {}
        return {key: str(value) for key, value in record.items() if value is not None}

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels of a classifier's head, in the order of its outputs; empty if they are not recorded.

        The provenance has them as a list in JSON.
        """
        try:
            return tuple(msgspec.json.decode(self.provenance.get("labels", "[]"), type=list[str]))
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return ()


def read_config(folder: Path, *, changed_base: bool = False) -> tuple[LoraConfig, Origin]:
    """Read a folder's adapter_config.json; one whose training changed the base only if `changed_base`.

    Raises:
        UnsupportedError: the adapter uses a feature that is not supported.
        AdapterError: the file is missing, not JSON, or invalid.
    """
    path = folder / CONFIG
    content = read_content(path)
    return _PARSED.get((content, changed_base), lambda: _parse(path, content, changed_base=changed_base))


_PARSED: Memo[tuple[bytes, bool], tuple[LoraConfig, Origin]] = Memo(64)


def _parse(path: Path, content: bytes, *, changed_base: bool) -> tuple[LoraConfig, Origin]:
    check_lfs(path, content)
    try:
        table = msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise AdapterError(
            f"{path} is not a JSON object: {error}", hint="Download or save the adapter again."
        ) from None
    if foreign.is_mlx(table):
        raise foreign.refusal("mlx", path.parent)
    if table.get("peft_type") != "LORA":
        raise UnsupportedError(
            f"{path} has peft_type {table.get('peft_type')!r}; only LORA adapters are supported", hint=RETRAIN
        )
    for key, (is_set, what, hint) in REFUSED.items():
        if key not in IN_TENSORS and is_set(table.get(key)) and not (changed_base and key == INIT):
            raise UnsupportedError(f"{path}: {key}={shorten(table[key], 60)} {what}; this is not supported", hint=hint)
    unknown = [*filter(may_change_results, unknown_settings(table))]
    if unknown:
        raise UnsupportedError(
            f"{path} has unknown settings, which may change what the adapter computes: {', '.join(unknown)[:200]}",
            hint="Remove from the file what does not.",
        )
    settings = {key: table[key] for key in READ if table.get(key) is not None}
    try:
        config = LoraConfig(**msgspec.convert(settings, _Fields).as_dict())
    except msgspec.ValidationError as error:
        key = re.search(r"`\$\.(\w+)", str(error))
        value = f"{key[1]} is {shorten(settings[key[1]])}: " if key else ""
        message = str(error).partition(" - at ")[0]
        raise AdapterError(
            f"{path}: {value}{message[:1].lower()}{message[1:]}",
            hint="Correct that value, or save the adapter again.",
        ) from None
    except ConfigError as error:
        raise AdapterError(
            f"{path} is invalid", error.problems, hint="Correct the values, or save the adapter again."
        ) from None
    fields = {key: value if isinstance(value := table.get(key), str) else None for key in ORIGIN}
    return config, Origin(fields["base_model_name_or_path"], fields["revision"], fields["task_type"], written=table)


def unknown_settings(table: Mapping[str, Any]) -> list[str]:
    """Return the keys of an adapter_config.json that are set, and that this version of loradeck does not know."""
    return sorted(key for key in table.keys() - READ - ORIGIN - WITHOUT_EFFECT - REFUSED.keys() if table[key])


class _Fields(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The types of the keys that are read; r and lora_alpha default to PEFT's values."""

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] = ()  # type: ignore[assignment]
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] = ()  # type: ignore[assignment]
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}
    modules_to_save: list[str] = ()  # type: ignore[assignment]

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__struct_fields__}


def read_content(path: Path) -> bytes:
    """Return the content of an adapter_config.json, of bounded size.

    Raises:
        AdapterError: it is missing or cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG:
            raise AdapterError(f"{path} has {size} bytes, more than the limit of {MAX_CONFIG}")
        return read_start(path, size + 1)[0]
    except (FileNotFoundError, NotADirectoryError):
        raise foreign.refused(path.parent) or no_adapter(path.parent) from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a null byte in the path
        raise AdapterError(f"{str(path)!r} cannot be read: {error}") from error


def write_config(config: LoraConfig, origin: Origin, *, fan_in_fan_out: bool) -> bytes:
    """Return an adapter_config.json that PEFT, vLLM and older PEFTs read; one read from a file is unchanged."""
    table = origin.written or {
        "alpha_pattern": dict(config.alpha_pattern),
        "base_model_name_or_path": origin.base_model,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": [*config.modules_to_save] or None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "revision": origin.revision,
        "target_modules": config.target_modules if isinstance(config.target_modules, str) else [*config.target_modules],
        "task_type": origin.task_type,
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }
    return msgspec.json.format(msgspec.json.encode(table), indent=2)
