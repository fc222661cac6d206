"""The contents of an adapter's folder: config and tensor headers, checked against each other. Imports no torch."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import msgspec

from loradeck.disk import Stamp, stamp_of
from loradeck.errors import AdapterError, ConfigError, UnsupportedError, shorten
from loradeck.lora import foreign
from loradeck.lora.config import PATH_LENGTH, LoraConfig
from loradeck.lora.folder import CONFIG, TENSORS, check_lfs
from loradeck.lora.memo import Memo
from loradeck.lora.patterns import literal_pattern
from loradeck.lora.peft import Origin, read_config
from loradeck.lora.safetensors_io import ITEM_BYTES, Entry, Header, read_header
from loradeck.lora.spelling import PREFIX, canonical, plain
from loradeck.lora.unsupported import RETRAIN

LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
TRAINED, ORIGINAL = ".modules_to_save.", ".original_module."  # in keys of the wrapper of a module of modules_to_save
ADAPTED_COPY = ".base_layer.weight"  # the end of a copy's key, of a module with a pair: PEFT never trains it
INDEX = TENSORS + ".index.json"
TENSOR_FILES = "adapter_model*"  # a glob: one file or shards, their index, and the pickles that are refused
STAMPED = (
    ".json",
    ".safetensors",
    ".jinja",
    ".model",
    ".txt",
)  # an adapter's files, and a tokenizer's beside it

UNSUPPORTED = {
    "lora_magnitude_vector": "DoRA magnitudes",
    "lora_B.bias": "a bias of B",
    "token_adapter.trainable_tokens_delta": "replaced token rows",
    "base_layer.out_proj.lora_": "pairs of a whole attention module (nn.MultiheadAttention)",
    "base_layer.lora_": "nested parameters (MoE experts)",
}


@dataclass(frozen=True, slots=True)
class TargetModule:
    """One adapted module: its kind, rank, scaling and shapes, as the tensors have them."""

    kind: str  # "linear" | "embedding" | "conv"
    r: int
    scaling: float
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """The rows of the weight that it changes: of an embedding its tokens, else the outputs."""
        return self.a_shape[1] if self.kind == "embedding" else self.b_shape[0]

    def with_rows(self, rows: int) -> "TargetModule":
        """Return the same with another number of rows."""
        if self.kind == "embedding":
            return replace(self, a_shape=(self.r, rows))
        return replace(self, b_shape=(rows, *self.b_shape[1:]))


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's folder, without the tensors' values."""

    folder: Path
    config: LoraConfig
    origin: Origin
    headers: tuple[Header, ...]
    sites: dict[str, TargetModule]  # by module path
    copies: tuple[str, ...]  # keys that repeat a weight of the base (PEFT saves targeted embeddings whole)
    saved: Mapping[str, Mapping[str, str]]  # by the path of a module that is replaced: parameter name -> key
    spellings: Mapping[str, str]  # key -> how the file spells it, of those that it spells another way
    paths: Mapping[str, str] = field(default_factory=dict)  # as on disk, of modules that are respelled
    base_rows: Mapping[str, int] = field(default_factory=dict)  # of the base's modules that have more rows here

    @property
    def entries(self) -> dict[str, tuple[Header, Entry]]:
        """Every tensor with its file."""
        return {key: (header, entry) for header in self.headers for key, entry in header.entries.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.size for header in self.headers)

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return sum((entry.end - entry.begin) // ITEM_BYTES[entry.dtype] for entry in self._trained())

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the trained values."""
        return sum(entry.end - entry.begin for entry in self._trained())

    @property
    def targets(self) -> object:
        """target_modules as the configuration has them; None if it does not say."""
        return (self.origin.written or {}).get("target_modules")

    def spelling(self, key: str) -> str:
        """Return a key as the file spells it, for errors."""
        return self.spellings.get(key, key)

    @property
    def saved_keys(self) -> list[str]:
        """The keys of the parameters of modules that are replaced."""
        return [key for keys in self.saved.values() for key in keys.values()]

    def respelled(self, paths: Mapping[str, str]) -> "AdapterFiles":
        """Return the same files with other paths of modules: path -> new path, for modules and those with copies."""
        if not paths:
            return self
        before = [header.entries for header in self.headers]
        key = before, self.sites, (*self.copies, *self.saved_keys), paths
        after, sites, whole, old = _MOVED.get(key, lambda: _moved(*key))
        copies, moved = whole[: len(self.copies)], iter(whole[len(self.copies) :])
        saved: dict[str, dict[str, str]] = {}
        for names in self.saved.values():
            for name, new in zip(names, moved, strict=False):
                saved.setdefault(new.removeprefix(PREFIX).removesuffix(f".{name}"), {})[name] = new
        headers = tuple(replace(header, entries=each) for header, each in zip(self.headers, after, strict=True))
        moves = {new: old for pair in zip(before, after, strict=True) for old, new in zip(*pair, strict=True)}
        spellings = {new: self.spelling(old) for new, old in moves.items() if new != self.spelling(old)}
        return replace(self, headers=headers, sites=sites, copies=copies, saved=saved, spellings=spellings, paths=old)

    def with_base_rows(self, rows: Mapping[str, int]) -> "AdapterFiles":
        """Return the same files for a base with fewer rows of some modules, whose sites are cut to the base's."""
        if not rows:
            return self
        return replace(self, sites=_CUT.get((self.sites, rows), lambda: _cut(self.sites, rows)), base_rows=rows)

    @property
    def resized(self) -> dict[str, tuple[int, int]]:
        """The pairs and copies with more rows than the base: key -> the dimension of rows, how many the base has."""
        pairs = {path: self.sites[path] for path in self.base_rows if path in self.sites}
        keys = {resized_key(path, site): path for path, site in pairs.items()}
        keys |= {key: path for key in self.copies if (path := copied_module(key)) in self.base_rows}
        return {key: (int(key.endswith(EMBEDDING[0])), self.base_rows[path]) for key, path in keys.items()}

    def _trained(self) -> list[Entry]:
        return [entry for key, (_, entry) in self.entries.items() if key not in self.copies]


_Spelling: TypeAlias = tuple[list[dict[str, Entry]], dict[str, TargetModule], tuple[str, ...], Mapping[str, str]]
_MOVED: Memo[_Spelling, _Spelling] = Memo()


def _moved(
    entries: list[dict[str, Entry]], sites: dict[str, TargetModule], copies: tuple[str, ...], paths: Mapping[str, str]
) -> _Spelling:
    keys = {
        old: new
        for path, site in sites.items()
        for old, new in zip(keys_of(path, site), keys_of(paths.get(path, path), site), strict=True)
    }
    keys |= {key: key.replace(path, paths.get(path, path), 1) for key in copies for path in [copied_module(key)]}
    return (
        [{keys[key]: entry for key, entry in each.items()} for each in entries],
        {paths.get(path, path): site for path, site in sites.items()},
        tuple(keys[key] for key in copies),
        {new: old for old, new in paths.items()},
    )


_CUT: Memo[tuple[dict[str, TargetModule], Mapping[str, int]], dict[str, TargetModule]] = Memo()


def _cut(sites: Mapping[str, TargetModule], rows: Mapping[str, int]) -> dict[str, TargetModule]:
    return {path: site.with_rows(rows[path]) if path in rows else site for path, site in sites.items()}


def copied_module(key: str) -> str:
    """Return the path of the module whose weight a copy repeats."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")[0]


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter's configuration or tensors, valid or not, or cannot be looked into.

    `read_folder` says what is wrong with it.
    """
    try:
        return (folder / CONFIG).exists() or any(folder.glob(TENSOR_FILES))
    except OSError:
        return True


def stamp(folder: Path) -> Stamp:
    """Return a value that changes whenever a file of an adapter does, or one that other tools write beside it.

    Raises:
        AdapterError: the folder cannot be read.
    """
    try:
        return stamp_of(folder, STAMPED)
    except OSError as error:
        raise AdapterError(f"{folder} cannot be read: {error.strerror}") from error


def keys_of(path: str, site: TargetModule) -> tuple[str, str]:
    """Return the names of a module's A and B in a PEFT file."""
    a, b = EMBEDDING if site.kind == "embedding" else LINEAR
    return PREFIX + path + a, PREFIX + path + b


def resized_key(path: str, site: TargetModule) -> str:
    """Return the name of the tensor of a module's pair that has a part for each row of its weight."""
    return keys_of(path, site)[site.kind != "embedding"]


def config_of(sites: Mapping[str, TargetModule]) -> LoraConfig:
    """Return a config that gives each of these modules its rank and scaling."""
    alphas = {path: _whole(site.scaling * site.r) for path, site in sites.items()}
    ranks = {path: site.r for path, site in sites.items()}
    ((r, _),), ((alpha, _),) = Counter(ranks.values()).most_common(1), Counter(alphas.values()).most_common(1)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=tuple(sorted(sites)),
        rank_pattern=literal_pattern({path: rank for path, rank in ranks.items() if rank != r}),
        alpha_pattern=literal_pattern({path: other for path, other in alphas.items() if other != alpha}),
    )


def _whole(number: float) -> float:
    return int(number) if number.is_integer() else number


def read_folder(
    folder: str | Path,
    in_base: Callable[[str], bool] = lambda _: False,
    *,
    tensors: Path | None = None,
    changed_base: bool = False,
) -> AdapterFiles:
    """Read a PEFT folder's configuration and tensor headers, and check them against each other.

    Args:
        folder: The adapter's folder.
        in_base: Whether the base has a module of a path: keys that a tool spells in another way than PEFT are
            respelled, except those with such a path; see `loradeck.lora.spelling`.
        tensors: A safetensors file in place of the folder's own.
        changed_base: Read an adapter whose initialisation changed the base too; alone it is not the whole change.

    Raises:
        UnsupportedError: the adapter uses a feature that is not supported.
        AdapterError: with every problem found in the folder.
    """
    folder = folder if isinstance(folder, Path) else Path(folder)
    config, origin = read_config(folder, changed_base=changed_base)
    try:
        headers: tuple[Header, ...] = (read_header(tensors or folder / TENSORS),)
    except FileNotFoundError:
        headers = tuple(_read_shard(path) for path in _shards(folder))
    origin = Origin(origin.base_model, origin.revision, origin.task_type, headers[0].metadata, origin.written)
    spellings: dict[str, str] = {}
    if not all(_SPELLED.get((header.entries,), lambda header=header: _is_canonical(header)) for header in headers):
        headers = tuple(_respelled(header, in_base, spellings) for header in headers)
        config, origin = _respelled_targets(config, origin)
    if config.modules_to_save:
        headers = tuple(_without_doubles(header) for header in headers)
    entries = headers[0].entries if len(headers) == 1 else _joined(headers, spellings)
    files = AdapterFiles(folder, config, origin, headers, {}, (), {}, spellings)
    order = [*config.rank_pattern, *config.alpha_pattern]  # equal dicts may differ in it, and the first match applies
    sites, copies, saved = _CHECKED.get((config, order, _ties(origin), entries), lambda: _sites(files, entries))
    heads = tuple(path for path in saved if config.saved_module(f"{path}.weight") is None)
    config = replace(config, modules_to_save=(*config.modules_to_save, *heads)) if heads else config
    return replace(files, config=config, sites=sites, copies=copies, saved=saved)


_SPELLED: Memo[tuple[dict[str, Entry]], bool] = Memo()
_Content = tuple[dict[str, TargetModule], tuple[str, ...], dict[str, dict[str, str]]]
_CHECKED: Memo[tuple[LoraConfig, list[str], bool, dict[str, Entry]], _Content] = Memo()


def _is_canonical(header: Header) -> bool:
    return all(canonical(key) == key for key in header.entries)


def _respelled(header: Header, in_base: Callable[[str], bool], spellings: dict[str, str]) -> Header:
    """Return a header with canonical keys; note in `spellings` how the file has those that it spells another way."""
    entries: dict[str, Entry] = {}
    for written, entry in header.entries.items():
        key = canonical(written, in_base)
        if key in entries:
            raise _twice(header, written, shorten(spellings.get(key, key), 120))
        if key != written:
            spellings[key] = written
        entries[key] = entry
    return replace(header, entries=entries)


def _without_doubles(header: Header) -> Header:
    """Return a header without what PEFT writes of the wrapper of a module beside the module, if its rows were resized.

    Those are the trained module again, and what it was before.
    """
    entries = header.entries
    doubles = {
        key for key in entries if ORIGINAL in key or (TRAINED in key and key.replace(TRAINED, ".", 1) in entries)
    }
    return replace(header, entries={key: entry for key, entry in entries.items() if key not in doubles})


def _respelled_targets(config: LoraConfig, origin: Origin) -> tuple[LoraConfig, Origin]:
    if isinstance(config.target_modules, str):
        return config, origin
    targets = [*dict.fromkeys(map(plain, config.target_modules))]
    written = {**(origin.written or {}), "target_modules": targets}
    return replace(config, target_modules=targets), replace(origin, written=written)


def _joined(headers: Sequence[Header], spellings: Mapping[str, str]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for header in headers:
        for key in header.entries.keys() & entries.keys():
            raise _twice(header, spellings.get(key, key), "that of another shard")
        entries.update(header.entries)
    return entries


def _twice(header: Header, key: str, other: str) -> AdapterError:
    return AdapterError(
        f"{header.path} has the tensor {shorten(key, 120)}, which is the same as {other}",
        hint="Remove one of the two, or save the adapter again; nothing was loaded.",
    )


def _read_shard(path: Path) -> Header:
    try:
        return read_header(path)
    except FileNotFoundError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from error


def _shards(folder: Path) -> list[Path]:
    """Return the files of an adapter that is not in one file."""
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / foreign.PICKLE).exists():
        raise foreign.refusal("pickle", folder / foreign.PICKLE)
    raise AdapterError(f"{folder} holds no {TENSORS}", hint="Download or save the adapter again.")


def _indexed(folder: Path) -> list[Path]:
    try:
        content = (folder / INDEX).read_bytes()
        check_lfs(folder / INDEX, content)
        table = msgspec.json.decode(content, type=dict[str, object])
        names = sorted(set(msgspec.convert(table.get("weight_map"), dict[str, str]).values()))
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise AdapterError(f"{folder / INDEX} cannot be read: {error}") from None
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
            raise AdapterError(f"{folder / INDEX} names the shard {name!r}, which is not a file name in this folder")
    if not names:
        raise AdapterError(f"{folder / INDEX} names no shard")
    return [folder / name for name in names]


def _sites(files: AdapterFiles, entries: Mapping[str, Entry]) -> _Content:
    problems: list[str] = []
    copies: list[str] = []
    saved: dict[str, dict[str, str]] = {}
    halves: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        written = files.spelling(key)
        if len(written) > len(PREFIX) + PATH_LENGTH:
            problems.append(f"the key {shorten(written, 120)} is too long: {len(written)} characters")
        elif (parts := _split(key)) is not None:
            path, half = parts
            halves.setdefault(path, {})[half] = entry
        elif unsupported := next((what for part, what in UNSUPPORTED.items() if part in key), None):
            raise UnsupportedError(f"{files.folder} has {unsupported} ({written}); this is not supported", hint=RETRAIN)
        elif module := files.config.saved_module(key.removeprefix(PREFIX)):
            saved.setdefault(module[0], {})[module[1]] = key
        elif key.endswith((".weight", ".bias")):
            copies.append(key)
        else:
            problems.append(f"unknown key {shorten(written, 120)}")
    if _ties(files.origin):  # PEFT saves an embedding of modules_to_save again, as the tied output head
        shapes = {entries[key].shape for keys in saved.values() for key in keys.values()}
        heads = [key for key in copies if not key.endswith(ADAPTED_COPY) and entries[key].shape in shapes]
        copies = [key for key in copies if key not in heads]
        saved |= {copied_module(key): {key.rpartition(".")[2]: key} for key in heads}
    sites: dict[str, TargetModule] = {}
    config = replace(files.config)  # a new one, whose patterns have their time for this file alone
    is_target = _is_target(files, halves)
    try:
        for path, pair in halves.items():
            shapes = _shapes(path, pair, problems)
            if shapes and not is_target(path):
                problems.append(f"{path} has tensors but is not a target in {CONFIG}")  # PEFT would ignore them
            elif shapes and config.rank(path) != (r := shapes[1][0]):
                problems.append(f"{path} has rank {r} in its tensors and {_rank(files, config, path)} in {CONFIG}")
            elif shapes:
                kind, a, b = shapes
                sites[path] = TargetModule(kind, a[0], config.scaling(path, a[0]), a, b)
    except ConfigError as error:
        raise AdapterError(f"{files.folder / CONFIG}: {error.message}", hint=error.hint) from None
    if not halves and not problems:
        problems.append("it has no A and no B")
    if problems:
        raise AdapterError(
            f"{files.folder} is incomplete or inconsistent",
            problems,
            hint="Train or save the adapter again; nothing was loaded.",
        )
    return sites, tuple(copies), saved


def _split(key: str) -> tuple[str, str] | None:
    for half, end in (("A", LINEAR[0]), ("B", LINEAR[1]), ("eA", EMBEDDING[0]), ("eB", EMBEDDING[1])):
        if key.endswith(end) and ".base_layer." not in key:
            return key[len(PREFIX) : -len(end)], half
    return None


def _shapes(
    path: str, pair: Mapping[str, Entry], problems: list[str]
) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """Return a pair's kind of module and the shapes of A and B, None if they are no pair."""
    names = sorted(pair)
    if names not in (["A", "B"], ["eA", "eB"]):
        problems.append(f"{path} has {' and '.join(names)} only, not one A and one B")
        return None
    a, b = (pair[name].shape for name in names)
    kind = "embedding" if names[0] == "eA" else "linear" if len(a) == 2 else "conv"
    if len(a) < 2 or len(a) != len(b) or 0 in a or 0 in b:
        problems.append(f"{path} has A {a} and B {b}: not matrices, as when a sharded training saves only one part")
        return None
    if kind != "conv" and b[1] != a[0]:
        problems.append(f"{path} has A {a} of rank {a[0]}, but B {b} of rank {b[1]}")
        return None
    return kind, a, b


def _is_target(files: AdapterFiles, halves: Mapping[str, Mapping[str, Entry]]) -> Callable[[str], bool]:
    """Return a function that says whether a path is a target in the configuration; a regex is not looked at."""
    targets = files.config.target_modules
    if isinstance(targets, str):
        return lambda _: True
    # With ensure_weight_tying, PEFT saves an embedding's pair again, transposed, as that of the tied output head.
    heads = [
        (pair["eB"].shape[::-1], pair["eA"].shape[::-1])
        for pair in halves.values()
        if _ties(files.origin) and pair.keys() >= {"eA", "eB"}
    ]
    return lambda path: (
        any(path == target or path.endswith("." + target) for target in targets)
        or (halves[path].keys() >= {"A", "B"} and (halves[path]["A"].shape, halves[path]["B"].shape) in heads)
    )


def _ties(origin: Origin) -> bool:
    return bool((origin.written or {}).get("ensure_weight_tying"))


def _rank(files: AdapterFiles, config: LoraConfig, path: str) -> str:
    """Return a module's rank as the configuration gives it, for errors."""
    r = config.rank(path)
    return f"{r}" if r != config.r or (files.origin.written or {}).get("r") else f"no r, so PEFT's default of {r},"
