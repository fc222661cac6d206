"""Keys that change what a record or message means, though its form does not need them.

Some say that it is not to be trained on; files write this in many ways. Others hold what is not text.
"""

from collections.abc import Mapping
from typing import Any

from loradeck.errors import DataError

# Keys of which 0 or false means: context only.
WEIGHTS = (
    "weight",
    "loss",
    "loss_weight",
    "loss_scale",
    "train",
    "training",
    "trainable",
    "train_on_turn",
    "learn",
    "compute_loss",
    "is_trainable",
)
# Keys that choose parts of a text, or whose sense differs from program to program.
MASKS = (
    "loss_mask",
    "mask",
    "masked",
    "train_detail",
    "train_details",
    "training_detail",
    "training_details",
    "completion_mask",
    "assistant_mask",
    "assistant_masks",
)
KINDS, WAYS = ("image", "audio", "video"), ("", "s", "_url", "_urls", "_path", "_paths", "_file")
MEDIA = (*(kind + way for kind in KINDS for way in WAYS), "pixel_values", "files")
JUDGEMENTS = ("kto_tag", "desirable")
WORDS = {"true": 1, "false": 0, "1": 1, "0": 0}  # in a CSV file


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, a blank text, or an empty list or object."""
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def read_weight(keys: Mapping[str, Any], path: str) -> int | None:
    """Return 1 or 0 as the keys say whether to train on this, None if none does; `path` is its JSON path, for errors.

    Raises:
        DataError: a value is neither, two keys contradict each other, or a key is not supported.
    """
    weights: dict[str, int] = {}
    for key, value in keys.items():
        if key in MASKS and not is_empty(value):
            raise DataError(f'{path}.{key}: is not supported; write "weight": 0 in a message not to train on')
        if key in MEDIA and not is_empty(value):
            raise DataError(f"{path}.{key}: is not text; only text can be trained on")
        if key in WEIGHTS and not is_empty(value):
            weights[key] = _binary(value, f"{path}.{key}")
        if key in JUDGEMENTS or (key == "label" and _is_judgement(value)):
            _refuse_bad(value, f"{path}.{key}")
    if len(set(weights.values())) > 1:
        raise DataError(f"{path}: {' and '.join(weights)} contradict each other; keep one")
    return next(iter(weights.values()), None)


def check_record(keys: Mapping[str, Any], *, plain: bool) -> None:
    """Refuse a record that is not to be trained on; `plain` is a text or tokens, whose label can be a class.

    Raises:
        DataError: as read_weight; or the weight is 0.
    """
    if read_weight(keys, "$") == 0:
        key = next(key for key in keys if key in WEIGHTS and not is_empty(keys[key]))
        raise DataError(f"$.{key}: says not to train on this record; remove it")
    if not plain and keys.get("label") in (0, "0"):
        _refuse_bad(keys["label"], "$.label")


def is_known(key: str, value: object) -> bool:
    """Whether the functions above heed a key."""
    return key in WEIGHTS or key in JUDGEMENTS or (key == "label" and _is_judgement(value))


def _binary(value: object, path: str) -> int:
    word = WORDS.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(word, int | float) or word not in (0, 1):
        shown = f"{value:g}" if isinstance(value, float) else f"{value!r:.24}"
        raise DataError(f"{path}: must be 0 or 1, not {shown}")
    return int(word)


def _is_judgement(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def _refuse_bad(value: object, path: str) -> None:
    if not is_empty(value) and not _binary(value, path):
        raise DataError(f"{path}: KTO is not supported: a bad completion would be trained on; keep the good ones")
