"""The embedding and the output head of a language model, where adapters may have rows for tokens of their own.

The base is not changed. A row of a batch sees the rows of its own adapters; a blend has those that all its adapters
have, their means by weight. For all other rows these tokens do not exist: their logits are -inf.

V rows of the base   K rows beyond them   H hidden size   N positions
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from loradeck.errors import AdapterError, RouteError
from loradeck.lora import targets
from loradeck.lora.adapter import Adapter
from loradeck.lora.added_rows import AddedRows, Extension, Part, count_of, shared_count
from loradeck.lora.manifest import AdapterFiles, copied_module, resized_key
from loradeck.lora.saved_modules import computed, replacement
from loradeck.ops.layer_kinds import EmbeddingKind, LayerKind, kind_of
from loradeck.ops.mapping import AdapterWeights, LoraMapping
from loradeck.ops.weights import LoraWeights


class Vocabulary:
    """An embedding or a head of V rows, where adapters may have more."""

    def __init__(self, rows: int, kind: LayerKind) -> None:
        self.rows, self.kind = rows, kind
        self.is_embedding = isinstance(kind, EmbeddingKind)

    def known(self, ids: Tensor, mapping: LoraMapping, parts: Sequence[Part]) -> Tensor:
        """Return ids (rows, …) with one of the base's in place of those beyond.

        Raises:
            RouteError: an id is beyond those of its row.
        """
        if not bool((ids >= self.rows).any()):
            return ids
        times = ids.numel() // mapping.total
        counts = [self.count(entry, parts) for entry in mapping.entries]
        lengths = torch.tensor([length * times for length in mapping.lengths])
        limits = (self.rows + torch.tensor(counts)).repeat_interleave(lengths).to(ids.device)
        flat = ids.reshape(-1)
        if bool((flat >= limits).any()):
            at = int((flat >= limits).nonzero()[0])
            raise RouteError(
                f"the token id {int(flat[at])} is beyond the {int(limits[at])} tokens of its row",
                hint="Give a row the tokens of the base and of its own adapters.",
            )
        return ids.clamp(max=self.rows - 1)

    def count(self, entry: AdapterWeights, parts: Sequence[Part]) -> int:
        """Return how many rows beyond the base's an entry of a route has."""
        return shared_count((count_of(parts[index], self.rows), weight) for index, weight in entry)

    def output(
        self,
        y: Tensor,
        base: Tensor,
        x: Tensor,
        entry: AdapterWeights,
        parts: Sequence[Part],
        pairs: Sequence[LoraWeights | None],
    ) -> Tensor:
        """Return the outputs for an entry: y those with its pairs, `base` the base's, x ids or hidden states."""
        members = [(parts[index], pairs[index] if pairs else None, weight) for index, weight in entry]
        part, _, weight = members[0]
        if len(members) == 1 and weight == 1 and isinstance(part, nn.Module):
            return computed(part, x)
        count = self.count(entry, parts)
        if not self.is_embedding:
            first = self._blend(y, base, x, members)
            return torch.cat([first, self._beyond(x, members, count).to(y.dtype)], -1) if count else first
        first = self._blend(y, base, x.clamp(max=self.rows - 1), members)
        beyond = x >= self.rows
        if not count or not bool(beyond.any()):
            return first
        first = first.clone()
        first[beyond] = self._beyond(x[beyond], members, count).to(y.dtype)
        return first

    def _blend(self, y: Tensor, base: Tensor, x: Tensor, members: Sequence[tuple[Part, object, float]]) -> Tensor:
        """y + Σ weight · (replacement - base) at the base's rows."""
        total = y
        for part, _, weight in members:
            if isinstance(part, nn.Module):
                value = computed(part, x).to(y.dtype)
                total = total + weight * ((value if self.is_embedding else value[..., : self.rows]) - base)
        return total

    def _beyond(self, x: Tensor, members: Sequence[tuple[Part, LoraWeights | None, float]], count: int) -> Tensor:
        """Σ weight · rows / Σ weight + Σ weight · update, of the first `count` rows beyond the base's."""
        whole = sum(weight for *_, weight in members)
        shown = slice(None) if self.is_embedding else slice(count)
        total = torch.zeros((), device=x.device)
        for part, pair, weight in members:
            assert part is not None
            if isinstance(part, nn.Module):
                rows, update = computed(part, x), None
                rows = rows if self.is_embedding else rows[..., self.rows :]
            else:
                rows, update = part.rows(x), part.update(x, pair)
            total = total + weight / whole * rows[..., shown]
            if update is not None:
                total = total + weight * update[..., shown]
        return total


# ---- of a model


Modules: TypeAlias = Mapping[str, nn.Module]
"""A model's embedding and head by their paths: see `modules`."""


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the embedding and the output head of a language model by their paths, the embedding first."""
    embedding, head = targets.input_embedding(model), targets.output_head(model)
    wanted = [module for module in (embedding, head) if module is not None and not isinstance(kind_of(module), str)]
    paths = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
    return {paths[id(module)]: module for module in wanted if id(module) in paths}


def rows_of(module: nn.Module) -> int:
    """Return V of an embedding or a head."""
    kind = _kind(module)
    return kind.shapes(1)[0][1] if kind.name == "embedding" else kind.shapes(1)[1][0]


def _kind(module: nn.Module) -> LayerKind:
    kind = kind_of(module)
    assert not isinstance(kind, str)
    return kind


def is_tied(ours: Modules) -> bool:
    """Return whether the head and the embedding are one weight."""
    weights = [module.get_parameter("weight") for module in ours.values()]
    return len(weights) == 2 and weights[0] is weights[1]


def base_rows(ours: Modules, files: AdapterFiles) -> dict[str, int]:
    """Return the rows of a model's embedding and head, where files have other numbers."""
    found = _rows_in(files)
    rows = {path: rows_of(module) for path, module in ours.items()}
    return {path: count for path, count in rows.items() if {*found.get(path, {}).values()} - {count}}


def fitted(ours: Modules, files: AdapterFiles) -> AdapterFiles:
    """Return files whose modules are spelled as a model's, with the model's rows where they have more.

    Raises:
        AdapterError: they have fewer; different numbers; or a pair for tokens whose own rows are not there.
    """
    base = base_rows(ours, files)
    if not base:
        return files
    found, paths, tied = _rows_in(files), [*ours], is_tied(ours)
    problems = []
    counts: dict[str, int] = {}
    for path, rows in base.items():
        numbers = found[path]
        if min(numbers.values()) < rows:
            key = min(numbers, key=numbers.__getitem__)
            problems.append(
                f"{files.spelling(key)} has {numbers[key]} rows, fewer than the {rows} of {path} in this base: a "
                "vocabulary that was made smaller is not supported"
            )
        elif len({*numbers.values()}) > 1:
            numbers = {files.spelling(key): number for key, number in numbers.items()}
            problems.append(f"{path} has different numbers of rows: {numbers}")
        else:
            counts[path] = numbers.popitem()[1] - rows
    if not problems:
        weights = {path: {*files.saved[path]} for path in files.saved}
        copied = [(copied_module(key), key.rpartition(".")[2]) for key in files.copies]
        for path, name in copied:
            weights.setdefault(path, set()).add(name)
        shared = tied and any(path in paths for path, _ in copied)
        for path in counts:
            lacking = {name for name, _ in ours[path].named_parameters()} - weights.get(path, set())
            if shared:
                lacking.discard("weight")
            what = f"{base[path] + counts[path]} rows of {path} in the adapter and {base[path]} in this base"
            problems += [f"there are {what}, and the file lacks the {name} of those beyond" for name in sorted(lacking)]
        embedding, head = paths[0], paths[-1]
        if counts.get(head, 0) > counts.get(embedding, counts.get(head, 0) if shared else 0):
            problems.append(f"{head} has rows for tokens that {embedding} has none for")
    if problems:
        raise AdapterError(
            f"{files.folder} does not fit the vocabulary of this base",
            problems,
            hint="Save the adapter with the embedding and the head of its resized base: PEFT has the option "
            "save_embedding_layers. Nothing was loaded.",
        )
    return files.with_base_rows(base)


def tokens_added_by(ours: Modules, files: AdapterFiles) -> int:
    """Return how many tokens beyond a model's the files have, which fit it: the rows of the embedding."""
    return _rows_added_by(ours, files, [*ours][:1])


def choices_added_by(ours: Modules, files: AdapterFiles) -> int:
    """Return how many of these tokens the model can choose: the rows of the output head."""
    return _rows_added_by(ours, files, [*ours][1:])


def _rows_added_by(ours: Modules, files: AdapterFiles, paths: list[str]) -> int:
    counts = _rows_in(files)
    copied = {copied_module(key) for key in files.copies}
    shared = copied.intersection(ours) if is_tied(ours) else set[str]()
    for path in (*paths, *shared):
        if path in files.base_rows:
            return max(counts[path].values()) - files.base_rows[path]
    return 0


def _rows_in(files: AdapterFiles) -> dict[str, dict[str, int]]:
    """Return the numbers of rows in files of each module whose weight or pair is in them: path -> key -> rows."""
    rows: dict[str, dict[str, int]] = {}
    for path, site in files.sites.items():
        rows.setdefault(path, {})[resized_key(path, site)] = site.rows
    whole = {key: copied_module(key) for key in files.copies}
    whole |= {key: path for path, keys in files.saved.items() for key in keys.values()}
    for key, path in whole.items():
        rows.setdefault(path, {})[key] = next(iter(files.entries[key][1].shape), 0)
    return rows


# ---- of an adapter on a model


def extensions(ours: Modules, adapter: Adapter, what: str) -> dict[str, Extension]:
    """Return what an adapter that adds rows has in place of a model's embedding and head, by path.

    Raises:
        AdapterError: its rows follow another number of rows.
    """
    added = {**adapter.added}
    copied = next((each for each in added.values() if each.weights and not each.trained), None)
    if copied and is_tied(ours):
        others = ours.keys() - added.keys() - adapter.saved.keys()
        added |= {path: AddedRows(copied.base, copied.count) for path in others}
    found = {}
    for path, each in added.items():
        if path not in ours or rows_of(ours[path]) != each.base:
            raise AdapterError(
                f"{what} has rows for tokens beyond {each.base} in {path}, which this base has not",
                hint="Load the base it was trained on.",
            )
        source = each if each.weights else copied
        assert source is not None
        rows = {name: adapter.added_rows(key) for name, key in source.weights.items()}
        part = adapter.added_rows(each.pair) if each.pair else None
        found[path] = Extension(_rows_alone(ours[path], rows), _kind(ours[path]), each, part)
    return found


def added_tokens(ours: Modules, adapter: Adapter) -> int:
    """Return how many tokens an adapter on a model has beyond the base's: the rows of its embedding."""
    path, module = next(iter(ours.items()), ("", None))
    return count_of(adapter.replacements.get(path), rows_of(module)) if isinstance(module, nn.Embedding) else 0


def merged_rows(ours: Modules, weighted: Sequence[tuple[Adapter, float]]) -> dict[str, dict[str, Tensor]]:
    """Return the rows for added tokens that a blend has, pairs included, by module and name of the parameter."""
    merged: dict[str, dict[str, Tensor]] = {}
    whole = sum(weight for _, weight in weighted)
    for path, module in ours.items():
        base = rows_of(module)
        parts = [(adapter.replacements.get(path), adapter.weights(path), weight) for adapter, weight in weighted]
        count = shared_count((count_of(part, base), weight) for part, _, weight in parts)
        if not count:
            continue
        merged[path] = {}
        for name, _ in module.named_parameters():
            total = torch.zeros(())
            for part, pair, weight in parts:
                assert part is not None
                if isinstance(part, nn.Module):
                    rows, update = part.get_parameter(name)[base:], None
                else:
                    rows, update = part.module.get_parameter(name), part.merged_update(pair)
                total = total.to(rows.device) + weight / whole * rows[:count].float()
                if update is not None and name == "weight":
                    total = total + weight * update[:count]
            merged[path][name] = total
    return merged


def _rows_alone(module: nn.Module, rows: Mapping[str, nn.Parameter]) -> nn.Module:
    """Return a copy of an embedding or a head that has these rows only."""
    alone = replacement(module, rows)
    if isinstance(alone, nn.Embedding):
        alone.num_embeddings, alone.padding_idx = len(rows["weight"]), None
    return alone
