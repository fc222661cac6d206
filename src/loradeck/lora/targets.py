"""Which modules of a model an adapter sits on. Knows module paths and types; knows no tensors and no language model."""

import difflib
import re
from collections.abc import Mapping, Sequence

from torch import nn

from loradeck.errors import TargetError
from loradeck.lora.config import LoraConfig
from loradeck.ops.layer_kinds import SUPPORTED, Form, form_of

HEADS = ("lm_head", "embed_out", "score", "classifier")  # names of output heads, as transformers' models use them
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)  # part of a path, in every common architecture
# These call kernels with their children's weights and never the children, so an adapter there would do nothing.
CLOSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def resolve(model: nn.Module, config: LoraConfig) -> dict[str, Form]:
    """Return the modules that the config's targets name, by path, with how each meets an adapter.

    Raises:
        TargetError: nothing matches (close names are listed), or a target takes no adapter.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    unreachable = closed(model)
    targets = config.target_modules
    if targets == "all-linear" or targets == "attention":
        head = _head(model)
        chosen = [
            path
            for path, module in modules.items()
            if getattr(form_of(module), "kind", None) == "linear" and path not in unreachable
            and (ATTENTION.search(path) if targets == "attention" else not _is_head(path, module, head))
        ]  # fmt: skip
    else:
        chosen = [path for path in modules if matches(path, targets)]
    matched = bool(chosen)
    chosen = [path for path in chosen if not matches(path, config.exclude_modules) and _in_layers(path, config)]
    if not chosen:
        raise _nothing(modules, config, matched=matched)
    forms: dict[str, Form] = {}
    problems = []
    for path in chosen:
        form = form_of(modules[path])
        if isinstance(form, str):
            problems.append(f"{path} is a {type(modules[path]).__name__}, which {form}")
        elif path in unreachable:
            problems.append(f"{path} lies in a {unreachable[path]}, which reads its weight and never calls it")
        elif form.kind == "conv" and config.rank(path) % modules[path].groups:  # type: ignore[operator]
            problems.append(f"{path} has {modules[path].groups} groups, which do not divide r={config.rank(path)}")
        else:
            forms[path] = form
    if problems:
        raise TargetError(
            "These targets take no adapter", problems, hint="Leave them out with exclude_modules, or name others."
        )
    return forms


def check(model: nn.Module, path: str, closed: Mapping[str, str]) -> Form | str:
    """Return how the module at `path` meets an adapter, or what is wrong with it as a target."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return "is no module of this base"
    if path in closed:
        return f"lies in a {closed[path]}, which reads its weight and never calls it"
    form = form_of(module)
    return form if not isinstance(form, str) else f"is a {type(module).__name__}, which {form}"


def suffixes(model: nn.Module, paths: Sequence[str]) -> str | tuple[str, ...]:
    """Return the shortest path endings that match exactly `paths` among the model's modules, sorted.

    Where no ending can (a path that also ends another's), return a regex.
    """
    wanted = set(paths)
    strangers: set[str] = set()
    for path, _ in model.named_modules():
        if path not in wanted:
            strangers.update(_endings(path))
    chosen = {path: next((end for end in _endings(path) if end not in strangers), "") for path in paths}
    endings = tuple(sorted({end for end in chosen.values() if end}))
    whole = "|".join(re.escape(path) for path in sorted(paths) if not chosen[path])
    if not whole:
        return endings
    return f"({whole})" + "".join(rf"|(.*\.)?{re.escape(end)}" for end in endings)


def matches(path: str, targets: str | Sequence[str]) -> bool:
    """Say whether `path` is a target: by suffix where they are a list, by the whole of a regex where they are text."""
    if isinstance(targets, str):
        return bool(targets) and re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith("." + target) for target in targets)


def _endings(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def closed(model: nn.Module) -> dict[str, str]:
    """Return the modules whose weights are read without calling them, by path, and the class that does so."""
    return {
        f"{path}.{inner}" if path else inner: type(module).__name__
        for path, module in model.named_modules()
        if isinstance(module, CLOSED)
        for inner, _ in module.named_modules()
        if inner
    }


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def _is_head(path: str, module: nn.Module, head: nn.Module | None) -> bool:
    return module is head or path.rpartition(".")[2] in HEADS


def _in_layers(path: str, config: LoraConfig) -> bool:
    wanted = config.layers_to_transform
    if wanted is None:
        return True
    names = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    parts = path.split(".")
    numbers = [
        int(part)
        for before, part in zip(["", *parts], parts, strict=False)
        if part.isdigit() and (not any(names) or before in names)
    ]
    return bool(numbers) and numbers[0] in ([wanted] if isinstance(wanted, int) else wanted)


def _nothing(modules: Mapping[str, nn.Module], config: LoraConfig, *, matched: bool) -> TargetError:
    if matched:
        return TargetError(
            f"exclude_modules and layers_to_transform leave nothing of target_modules {config.target_modules!r}",
            hint="Widen one of them.",
        )
    able = [path for path, module in modules.items() if not isinstance(form_of(module), str)]
    leaves = sorted({path.rpartition(".")[2] for path in able})
    asked = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    close = [name for target in asked for name in difflib.get_close_matches(target, leaves + able, n=3)]
    shown = ", ".join(dict.fromkeys(close or leaves[:12])) or f"none: it has no {SUPPORTED}"
    return TargetError(
        f"target_modules {config.target_modules!r} match no module of this model",
        hint=f"Close names: {shown}" if close else f"It has: {shown}",
    )
