"""Which modules of a model a LoraConfig targets."""

import difflib
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from torch import nn

from loradeck.errors import TargetError
from loradeck.lora.config import LoraConfig
from loradeck.lora.patterns import Patterns
from loradeck.ops.layer_kinds import SUPPORTED, LayerKind, kind_of

HEADS = ("lm_head", "embed_out", "score", "classifier")  # names of output heads, as transformers' models use them
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)  # in a module's path, in every common architecture
# These read their children's weights and never call the children, so an adapter there would have no effect.
CLOSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def resolve(model: nn.Module, config: LoraConfig) -> dict[str, LayerKind]:
    """Return the kind of each module that the config targets, by path.

    Raises:
        TargetError: no module matches (close names are listed), or a target takes no adapter.
    """
    modules = _modules(model)
    unreachable = closed(model)
    matched = _matched(model, modules, config, unreachable)
    chosen = _chosen(matched, config)
    if not chosen:
        raise _nothing(modules, config, matched=bool(matched))
    kinds: dict[str, LayerKind] = {}
    problems = []
    for path in chosen:
        kind = kind_of(modules[path])
        if isinstance(kind, str):
            problems.append(f"{path} is a {type(modules[path]).__name__}, which {kind}")
        elif path in unreachable:
            problems.append(f"{path} is inside a {unreachable[path]}, which reads its weight and never calls it")
        elif kind.name == "conv" and config.rank(path) % modules[path].groups:  # type: ignore[operator]
            problems.append(f"{path} has {modules[path].groups} groups; r={config.rank(path)} is not a multiple")
        else:
            kinds[path] = kind
    if problems:
        raise TargetError(
            "These targets take no adapter", problems, hint="Exclude them with exclude_modules, or choose others."
        )
    return kinds


def lacking(model: nn.Module, config: LoraConfig, paths: Container[str]) -> list[str]:
    """Return the modules that the config targets, that take an adapter, and that are not among `paths`."""
    modules = _modules(model)
    unreachable = closed(model)
    return [
        path
        for path in _chosen(_matched(model, modules, config, unreachable), config)
        if path not in paths and path not in unreachable and not isinstance(kind_of(modules[path]), str)
    ]


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if path}


def _matched(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, unreachable: Container[str]
) -> list[str]:
    """Return the paths that target_modules match."""
    targets = config.target_modules
    if targets != "all-linear" and targets != "attention":
        return [*filter(_matcher("target_modules", targets), modules)]
    head = output_head(model)
    return [
        path
        for path, module in modules.items()
        if getattr(kind_of(module), "name", None) == "linear" and path not in unreachable
        and (ATTENTION.search(path) if targets == "attention" else not _is_head(path, module, head))
    ]  # fmt: skip


def _chosen(paths: Sequence[str], config: LoraConfig) -> list[str]:
    """Return the paths that exclude_modules and layers_to_transform leave."""
    excluded = _matcher("exclude_modules", config.exclude_modules)
    return [
        path
        for path in paths
        if not excluded(path) and _in_layers(path, config) and not config.saved_module(f"{path}.weight")
    ]


def check(model: nn.Module, path: str, closed: Mapping[str, str]) -> LayerKind | str:
    """Return the kind of the module at `path`, or the reason why it takes no adapter."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return "is not a module of this base"
    if path in closed:
        return f"is inside a {closed[path]}, which reads its weight and never calls it"
    kind = kind_of(module)
    return kind if not isinstance(kind, str) else f"is a {type(module).__name__}, which {kind}"


def suffixes(modules: Iterable[str], paths: Sequence[str]) -> str | tuple[str, ...]:
    """Return the shortest path endings that match exactly `paths` among all modules' paths, sorted.

    If no ending can (a path that also ends another one), return a regex.
    """
    wanted = set(paths)
    others: set[str] = set()
    for path in modules:
        if path not in wanted:
            others.update(_endings(path))
    chosen = {path: next((end for end in _endings(path) if end not in others), "") for path in paths}
    endings = tuple(sorted({end for end in chosen.values() if end}))
    whole = "|".join(re.escape(path) for path in sorted(paths) if not chosen[path])
    if not whole:
        return endings
    return f"({whole})" + "".join(rf"|(.*\.)?{re.escape(end)}" for end in endings)


def _matcher(name: str, targets: str | Sequence[str]) -> Callable[[str], bool]:
    """Return a function that says whether a path is a target: by suffix for a list, by full match for a regex."""
    if isinstance(targets, str):
        patterns = Patterns(name, [targets] if targets else [])
        return lambda path: patterns.first(path) is not None
    suffixes = frozenset(targets)
    return lambda path: not suffixes.isdisjoint(_endings(path))


def _endings(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def closed(model: nn.Module) -> dict[str, str]:
    """Return the modules whose weights are read without calling them: path -> the class that does so."""
    return {
        f"{path}.{inner}" if path else inner: type(module).__name__
        for path, module in model.named_modules()
        if isinstance(module, CLOSED)
        for inner, _ in module.named_modules()
        if inner
    }


def stacked_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the stacks of matrices that are parameters of no layer, such as a mixture's experts; they take no adapter.

    By the path of their module and their own name.
    """
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(kind_of(module), str)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 2
    }


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the module that turns token ids into hidden states, None if the model names none."""
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    return embedding if isinstance(embedding, nn.Module) else None


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that turns hidden states into logits, None if the model names none."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def task_heads(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules that a classifier has besides its body, and that an adapter is to bring.

    They are those whose weights the base lacks, else the last one.
    """
    body = f"{getattr(model, 'base_model_prefix', '')}."
    lacking = sorted(vars(model).get("missing_weights", ()))
    if lacking:
        return tuple(dict.fromkeys(".".join(name.split(".")[: 2 if name.startswith(body) else 1]) for name in lacking))
    heads = [
        name
        for name, module in model.named_children()
        if f"{name}." != body and next(module.parameters(), None) is not None
    ]
    return tuple(heads[-1:])


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
            f"exclude_modules and layers_to_transform exclude all of target_modules {config.target_modules!r}",
            hint="Relax one of them.",
        )
    candidates = [path for path, module in modules.items() if not isinstance(kind_of(module), str)]
    leaves = sorted({path.rpartition(".")[2] for path in candidates})
    names = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    close = [name for target in names for name in difflib.get_close_matches(target, leaves + candidates, n=3)]
    shown = ", ".join(dict.fromkeys(close or leaves[:12])) or f"none; it has no {SUPPORTED}"
    return TargetError(
        f"target_modules {config.target_modules!r} match no module of this model",
        hint=f"Close names: {shown}" if close else f"Available: {shown}",
    )
