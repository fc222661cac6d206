"""How an embedding model makes one vector of a row's hidden states, as its sentence-transformers files say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from loradeck.errors import BaseModelError

MODULES = "modules.json"
MODES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda hidden, mask: (hidden * mask).sum(1) / mask.sum(1),
    "cls": lambda hidden, mask: hidden[:, 0],  # noqa: ARG005
    "lasttoken": lambda hidden, mask: hidden[torch.arange(len(hidden)), mask[..., 0].sum(1).long() - 1],
    "max": lambda hidden, mask: hidden.masked_fill(mask == 0, -torch.inf).amax(1),
}
"""By sentence-transformers' names: hidden (rows, tokens, width), mask (rows, tokens, 1) of 1 and 0 -> (rows, width)."""
KEYS = {  # of older files, which have a flag for each mode
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


@dataclass(frozen=True, slots=True)
class Pooling:
    """One of `MODES`, and whether the vector is then divided by its length."""

    mode: str
    normalize: bool = False

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Pool hidden states (rows, tokens, width), padded on the right: mask (rows, tokens) -> (rows, width) float32.

        Padding is left out, whatever its values are.
        """
        states = hidden.float().masked_fill(mask[..., None] == 0, 0.0)
        pooled = MODES[self.mode](states, mask[..., None].float())
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


def pooling_of(model: PreTrainedModel, where: str) -> Pooling:
    """Return the pooling of a folder or hub id, as its files say.

    Without such files it is the mean of an encoder's states, and a decoder's last.

    Raises:
        BaseModelError: its files ask for what is not supported here, or cannot be read.
    """
    modules = _read(where, MODULES)
    if modules is None:
        return Pooling("lasttoken" if is_causal(model) else "mean")
    try:
        kinds = [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules]
    except (TypeError, KeyError) as error:
        raise _unsupported(where, f"{MODULES} is not a list of modules") from error
    if unknown := [kind for kind, _ in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise _unsupported(where, f"a module {unknown[0]!r:.40} in {MODULES}")
    paths = [path for kind, path in kinds if kind == "Pooling"]
    if len(paths) != 1:
        raise _unsupported(where, f"{len(paths)} modules for pooling in {MODULES}")
    file = f"{paths[0]}/config.json"
    return Pooling(_mode(where, file, _read(where, file)), any(kind == "Normalize" for kind, _ in kinds))


def is_causal(model: PreTrainedModel) -> bool:
    """Return whether a token sees only those before it."""
    return any(getattr(module, "is_causal", False) for module in model.modules())


def _mode(where: str, file: str, settings: Any) -> str:
    if not isinstance(settings, dict):
        raise _unsupported(where, f"{file} is missing or not an object")
    named = settings.get("pooling_mode")
    modes = [named] if named is not None else [mode for key, mode in KEYS.items() if settings.get(key)]
    if len(modes) != 1 or modes[0] not in MODES:
        raise _unsupported(where, f"the pooling {' and '.join(map(str, modes)) or 'of no mode':.60} in {file}")
    return str(modes[0])


def _read(where: str, file: str) -> Any:
    """Return a file's JSON, None if there is no such file."""
    path = cached_file(where, file, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    try:
        return msgspec.json.decode(Path(path).read_bytes())
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise _unsupported(where, f"{file} cannot be read") from error


def _unsupported(where: str, what: str) -> BaseModelError:
    return BaseModelError(
        f"{where} cannot be loaded to embed: {what}",
        hint=f"Supported are modules of the kinds Transformer, Pooling ({', '.join(MODES)}) and Normalize.",
    )
