"""How files spell the modules of a model that is a part of another one, such as the language model of a multimodal one.

Such a model says so by attributes of its own: `whole_paths`, where its parts lie in the whole model, as {"model":
"model.language_model"}; and `left_out`, the paths of the whole model's other modules. Adapters are written as the whole
model spells them. What is read may be spelled otherwise: see `respellings`.
"""

from collections.abc import Collection, Iterator, Mapping

from torch import nn

# Where body and head of a language model lie: alone; in a multimodal model of transformers; in one before 4.52.
PLACES = (
    ("model", "lm_head"),
    ("model.language_model", "lm_head"),
    ("language_model.model", "language_model.lm_head"),
)


def paths_in_files(model: nn.Module, paths: Collection[str]) -> dict[str, str]:
    """Return how files spell these modules, of those that they spell otherwise."""
    return _moved(paths, vars(model).get("whole_paths", {}))


def module_names(model: nn.Module) -> list[str]:
    """Return the paths of all modules of the whole model, as files spell them."""
    paths = [path for path, _ in model.named_modules()]
    moved = paths_in_files(model, paths)
    return [*(moved.get(path, path) for path in paths), *vars(model).get("left_out", ())]


def why_left_out(model: nn.Module, path: str) -> str | None:
    """Return what a module is a part of that this model has left out, None if it has not."""
    left_out = vars(model).get("left_out", ())
    if path not in left_out:
        return None
    inside = [*vars(model).get("whole_paths", {}).values()]
    tops = (top for top in left_out if path == top or path.startswith(top + "."))
    top = next(top for top in tops if not any(part.startswith(top + ".") for part in inside))
    return f"belongs to {top}, which is left out: this base is a language model alone, for text"


def respellings(model: nn.Module, paths: Collection[str]) -> Iterator[dict[str, str]]:
    """Yield ways to spell modules so that some are found in the model, each as {path: path in the model}."""
    modules = {path for path, _ in model.named_modules()}
    whole: Mapping[str, str] = vars(model).get("whole_paths", {})
    places = [{theirs: ours for ours, theirs in whole.items()}]
    places += [dict(zip(theirs, ours, strict=True)) for theirs in PLACES for ours in PLACES if theirs != ours]
    seen: list[dict[str, str]] = []
    for place in places:
        moved = _moved(paths, place)
        apart = len({moved.get(path, path) for path in paths}) == len({*paths})  # no two become one
        if apart and moved not in seen and not modules.isdisjoint(moved.values()):
            seen.append(moved)
            yield moved


def _moved(paths: Collection[str], places: Mapping[str, str]) -> dict[str, str]:
    """Return the paths that change if modules move: {path: new path}."""
    moved = {}
    for path in paths:
        for old, new in places.items():
            if old != new and (path == old or path.startswith(old + ".")):
                moved[path] = new + path.removeprefix(old)
    return moved
