"""The contents of an adapter's folder: config and tensor headers, checked against each other. Imports no torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loradeck.errors import AdapterError, UnsupportedError
from loradeck.lora import foreign
from loradeck.lora.config import PATH_LENGTH, LoraConfig, literal_pattern, shorten
from loradeck.lora.memo import Memo
from loradeck.lora.peft import CONFIG, RETRAIN, TENSORS, Origin, read_config
from loradeck.lora.safetensors_io import ITEM_BYTES, Entry, Header, read_header

PREFIX = "base_model.model."
LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
INDEX = TENSORS + ".index.json"
TENSOR_FILES = "adapter_model*"  # a glob: one file or shards, their index, and the pickles that are refused

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


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's folder, without the tensors' values."""

    folder: Path
    config: LoraConfig
    origin: Origin
    headers: tuple[Header, ...]
    sites: dict[str, TargetModule]  # by module path
    copies: tuple[str, ...]  # keys that repeat a weight of the base (PEFT saves targeted embeddings whole)

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

    def _trained(self) -> list[Entry]:
        return [entry for key, (_, entry) in self.entries.items() if key not in self.copies]


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter's configuration or tensors, valid or not, or cannot be looked into.

    `read_folder` says what is wrong with it.
    """
    try:
        return (folder / CONFIG).exists() or any(folder.glob(TENSOR_FILES))
    except OSError:
        return True


def keys_of(path: str, site: TargetModule) -> tuple[str, str]:
    """Return the names of a module's A and B in a PEFT file."""
    a, b = EMBEDDING if site.kind == "embedding" else LINEAR
    return PREFIX + path + a, PREFIX + path + b


def config_of(sites: Mapping[str, TargetModule]) -> LoraConfig:
    """Return a config that gives each of these modules its rank and scaling."""
    alphas = {path: _plain(site.scaling * site.r) for path, site in sites.items()}
    ranks = {path: site.r for path, site in sites.items()}
    ((r, _),), ((alpha, _),) = Counter(ranks.values()).most_common(1), Counter(alphas.values()).most_common(1)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=tuple(sorted(sites)),
        rank_pattern=literal_pattern({path: rank for path, rank in ranks.items() if rank != r}),
        alpha_pattern=literal_pattern({path: other for path, other in alphas.items() if other != alpha}),
    )


def _plain(number: float) -> float:
    return int(number) if number.is_integer() else number


def read_folder(folder: str | Path, *, tensors: Path | None = None, changed_base: bool = False) -> AdapterFiles:
    """Read a PEFT folder's configuration and tensor headers, and check them against each other.

    Args:
        folder: The adapter's folder.
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
    entries = headers[0].entries if len(headers) == 1 else _joined(headers)
    order = [*config.rank_pattern, *config.alpha_pattern]  # equal dicts may differ in it, and the first match applies
    sites, copies = _CHECKED.get((config, order, entries), lambda: _sites(folder, config, entries))
    return AdapterFiles(folder, config, origin, headers, sites, copies)


_CHECKED: Memo[tuple[LoraConfig, list[str], dict[str, Entry]], tuple[dict[str, TargetModule], tuple[str, ...]]] = Memo()


def _joined(headers: Sequence[Header]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for header in headers:
        for key in header.entries.keys() & entries.keys():
            raise AdapterError(f"{header.path} has the tensor {key}, which another shard has too")
        entries.update(header.entries)
    return entries


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
        table = msgspec.json.decode((folder / INDEX).read_bytes(), type=dict[str, object])
        names = sorted(set(msgspec.convert(table.get("weight_map"), dict[str, str]).values()))
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise AdapterError(f"{folder / INDEX} cannot be read: {error}") from None
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
            raise AdapterError(f"{folder / INDEX} names the shard {name!r}, which is not a file name in this folder")
    if not names:
        raise AdapterError(f"{folder / INDEX} names no shard")
    return [folder / name for name in names]


def _sites(
    folder: Path, config: LoraConfig, entries: Mapping[str, Entry]
) -> tuple[dict[str, TargetModule], tuple[str, ...]]:
    problems: list[str] = []
    copies: list[str] = []
    halves: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        if len(key) > len(PREFIX) + PATH_LENGTH:
            problems.append(f"the key {shorten(key, 120)} is too long: {len(key)} characters")
        elif not key.startswith(PREFIX):
            problems.append(f"the key {shorten(key, 120)} does not start with {PREFIX}")
        elif (parts := _split(key)) is not None:
            path, half = parts
            halves.setdefault(path, {})[half] = entry
        elif unsupported := next((what for part, what in UNSUPPORTED.items() if part in key), None):
            raise UnsupportedError(f"{folder} has {unsupported} ({key}); this is not supported", hint=RETRAIN)
        elif key.endswith(".weight"):
            copies.append(key)
        else:
            problems.append(f"unknown key {shorten(key, 120)}")
    sites: dict[str, TargetModule] = {}
    for path, pair in halves.items():
        site = _site(path, pair, config, problems)
        if site:
            sites[path] = site
    if not halves and not problems:
        problems.append("it has no A and no B")
    if problems:
        raise AdapterError(
            f"{folder} is incomplete or inconsistent",
            problems,
            hint="Train or save the adapter again; nothing was loaded.",
        )
    return sites, tuple(copies)


def _split(key: str) -> tuple[str, str] | None:
    for half, end in (("A", LINEAR[0]), ("B", LINEAR[1]), ("eA", EMBEDDING[0]), ("eB", EMBEDDING[1])):
        if key.endswith(end) and ".base_layer." not in key:
            return key[len(PREFIX) : -len(end)], half
    return None


def _site(path: str, pair: Mapping[str, Entry], config: LoraConfig, problems: list[str]) -> TargetModule | None:
    names = sorted(pair)
    if names not in (["A", "B"], ["eA", "eB"]):
        problems.append(f"{path} has {' and '.join(names)} only, not one A and one B")
        return None
    a, b = (pair[name].shape for name in names)
    kind = "embedding" if names[0] == "eA" else "linear" if len(a) == 2 else "conv"
    r = a[0] if a else 0
    if len(a) < 2 or len(a) != len(b) or 0 in a or 0 in b:
        problems.append(f"{path} has A {a} and B {b}: not matrices, as when a sharded training saves only one part")
        return None
    if kind != "conv" and b[1] != r:
        problems.append(f"{path} has A {a} of rank {r}, but B {b} of rank {b[1]}")
        return None
    targets = config.target_modules
    if not isinstance(targets, str) and not any(path == target or path.endswith("." + target) for target in targets):
        problems.append(f"{path} has tensors but is not a target in adapter_config.json")  # PEFT would ignore them
        return None
    if config.rank(path) != r:
        problems.append(f"{path} has rank {r} in its tensors and {config.rank(path)} in adapter_config.json")
        return None
    return TargetModule(kind, r, config.scaling(path, r), a, b)
