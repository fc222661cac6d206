"""One spelling for the keys of adapter files: those of PEFT's own files, whatever the tool that wrote them."""

import re
from collections.abc import Callable

PREFIX = "base_model.model."

# What torch's and accelerate's wrappers put into the path of the module they wrap, wherever that is.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# DistributedDataParallel and DeepSpeed wrap whole models, in a child whose name other models have too.
START = re.compile(r"(?:base_model\.model\.|module\.(?!lora_|base_layer\.|(?:weight|bias)$))*")
# A PeftModel in memory has a level for the adapter's name; its files do not.
NAMED = re.compile(
    r"(\.lora_[AB])\.[^.]+(?=\.(?:weight|bias)$)|(\.lora_embedding_[AB]|\.lora_magnitude_vector)\.[^.]+$"
)
TENSOR = re.compile(r"\.(?:lora_[AB]\.(?:weight|bias)|lora_\w+|(?:base_layer\.)?(?:weight|bias))$")
# Most keys need nothing, and a quick look says so.
USUAL = re.compile(
    r"base_model\.model\.(?!base_model\.|module\.)(?:(?!_|lora_)[^.]+\.)+lora_(?:[AB]\.weight|embedding_[AB])"
)


def canonical(key: str, in_base: Callable[[str], bool] = lambda _: False) -> str:
    """Return a key as PEFT's files spell it: `base_model.model.<module path>.lora_A.weight`, and so on.

    Wrappers and the adapter's name are taken out; a missing prefix is added, and one that is repeated dropped. A path
    for which `in_base(path)` holds stays as it is: some bases are wrapped themselves, or have such names of their own.
    """
    if USUAL.fullmatch(key):
        return key
    key = NAMED.sub(lambda match: match[1] or match[2], "." + key)[1:]
    path = key.removeprefix(PREFIX)
    bare = plain(key)
    return PREFIX + (path if path != bare and in_base(TENSOR.sub("", path)) else bare)


def plain(path: str) -> str:
    """Return a module path, or the rest of a key, without prefix and wrappers."""
    return START.sub("", WRAPPERS.sub("", path), count=1)
