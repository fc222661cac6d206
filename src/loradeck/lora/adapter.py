"""One adapter: a configuration and its low-rank tensors; on disk, a PEFT folder."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from itertools import accumulate, starmap
from pathlib import Path
from typing import Any, Self

import msgspec
import torch
from torch import Tensor, nn

from loradeck.disk import new_folder
from loradeck.errors import AdapterError, UnsupportedError
from loradeck.lora import added_rows, card, safetensors_io
from loradeck.lora.added_rows import AddedRows, Extension
from loradeck.lora.config import LoraConfig
from loradeck.lora.flat import LAYOUTS, FlatLayout, Span
from loradeck.lora.folder import CARD, CONFIG, TENSORS
from loradeck.lora.manifest import ADAPTED_COPY, AdapterFiles, TargetModule, keys_of, read_folder, stamp
from loradeck.lora.memo import Memo
from loradeck.lora.peft import Origin, write_config
from loradeck.lora.spelling import PREFIX
from loradeck.lora.unsupported import ANY_BASE
from loradeck.ops.dropout import Dropout
from loradeck.ops.weights import LoraWeights, finite
from loradeck.tokenizer_files import TokenizerFiles

log = logging.getLogger(__name__)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ADDED = "/added"  # after the names of what is for rows beyond the base's
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Adapter(nn.Module):
    """A configuration and, for each module it adapts, a pair A (r, …), B (out, …).

    A trainable adapter has one parameter per tensor. A frozen one, as `load` returns it, has one flat parameter per
    dtype, and its tensors are views of it: no memory beyond its bytes, one read to load, one tensor to move.

    Attributes:
        config: the LoraConfig, with its targets resolved.
        sites: kind, rank, scaling and shapes for each module path.
        origin: where it comes from.
        paths: how its files spell the modules that they spell otherwise.
        tokenizer_files: those of a tokenizer in the folder it was read from; none if it was made in memory.
        dropout: the dropout of its inputs in training; None if lora_dropout is 0.
        saved: the names of the parameters of each module that it replaces, by the module's path.
        added: what it has for rows of an embedding or a head beyond the base's, by the module's path.
        replacements: what stands in for the base's modules, with its parameters; a bank makes them.
        base_modules: the base's modules that it adds rows to, with which they are saved.
        added_tokens: how many tokens it has beyond those of the base whose bank it is in.
    """

    def __init__(self, config: LoraConfig, sites: Mapping[str, TargetModule], origin: Origin | None = None) -> None:
        """Create an adapter without tensors; use `of` or `load`."""
        super().__init__()
        self.config = config
        self.sites: Mapping[str, TargetModule] = sites
        self.origin = origin or Origin()
        self.paths: Mapping[str, str] = {}
        self.tokenizer_files = TokenizerFiles()
        self.fan_in_fan_out = False
        self.dropout = Dropout(config.lora_dropout) if config.lora_dropout > 0 else None
        self.saved: Mapping[str, tuple[str, ...]] = {}
        self.added: Mapping[str, AddedRows] = {}
        self.replacements: dict[str, nn.Module | Extension] = {}
        self.base_modules: dict[str, nn.Module] = {}
        self.added_tokens = 0
        self.moves = 0  # how often its tensors were moved or cast
        self._spans: Mapping[str, Span] = {}  # of each key, in the flat parameters
        self._layout: FlatLayout | None = None

    @classmethod
    def of(
        cls,
        config: LoraConfig,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        *,
        origin: Origin | None = None,
        trainable: bool = False,
    ) -> Self:
        """Make an adapter of tensors: module path -> (A (r, in), B (out, r)), or embeddings' and convolutions' shapes.

        A two-dimensional pair is a linear layer's. The ranks are the tensors', the scaling is the config's.
        """
        sites = {
            path: _site_of(config, path, a, b, "linear" if a.dim() == 2 else "conv") for path, (a, b) in pairs.items()
        }
        config = config.of_modules({path: site.r for path, site in sites.items()}, tuple(sorted(pairs)))
        return cls.with_sites(config, sites, pairs, origin=origin, trainable=trainable)

    @classmethod
    def with_sites(
        cls,
        config: LoraConfig,
        sites: Mapping[str, TargetModule],
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        *,
        origin: Origin | None = None,
        saved: Mapping[str, Mapping[str, Tensor]] | None = None,
        trainable: bool = False,
    ) -> Self:
        """Make an adapter of tensors, with their sites; `saved` are the parameters of the modules that it replaces."""
        adapter = cls(config, sites, origin)
        with torch.inference_mode(False), torch.no_grad():  # see from_files
            for path, pair in pairs.items():
                for key, tensor in zip(keys_of(path, adapter.sites[path]), pair, strict=True):
                    adapter.register_parameter(
                        _parameter_name(key),
                        nn.Parameter(tensor.detach().clone(), requires_grad=trainable),
                    )
            adapter._save_modules(saved or {}, trainable=trainable)
        return adapter

    def _save_modules(self, saved: Mapping[str, Mapping[str, Tensor]], *, trainable: bool) -> None:
        """Keep the parameters of modules; those of one module get one dtype, which holds all of them."""
        self.saved = {path: tuple(tensors) for path, tensors in saved.items()}
        for path, tensors in saved.items():
            dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
            for name, tensor in tensors.items():
                key = _parameter_name(f"{path}.{name}")
                value = tensor.detach().to(dtype, copy=True)
                self.register_parameter(key, nn.Parameter(value, requires_grad=trainable))

    @classmethod
    def load(cls, folder: str | Path, *, trainable: bool = False) -> Self:
        """Read a PEFT folder.

        Raises:
            UnsupportedError: it uses a feature that is not supported.
            AdapterError: with every problem found.
        """
        return cls.from_files(read_folder(folder), trainable=trainable)

    @classmethod
    def from_files(
        cls,
        files: AdapterFiles,
        *,
        trainable: bool = False,
        check_copy: Callable[[str, Tensor], str | None] | None = None,
    ) -> Self:
        """Read the tensors of a folder whose headers are read.

        `check_copy(key, tensor)` returns what is wrong with a copy of a weight of the base, or None; it is called
        first with a tensor on the meta device, then with the values. Without it a copy is a problem. A module that is
        replaced by a copy of itself is left out. Of an embedding or a head with more rows than the base's, only those
        beyond are kept, unless the others were trained or are to be.

        Raises:
            UnsupportedError: a tensor replaces a weight of the base.
            AdapterError: with every problem found.
        """
        check_copy = check_copy or (lambda *_: "is a copy of a weight of the base")
        adapter = cls(files.config, files.sites, files.origin)
        adapter.paths = files.paths
        adapter.fan_in_fan_out = bool((files.origin.written or {}).get("fan_in_fan_out"))
        adapter.tokenizer_files = TokenizerFiles.of(files.folder.absolute(), stamp(files.folder))
        # A tensor made in inference mode has no version counter and could never be trained.
        with torch.inference_mode(False), torch.no_grad():
            # Shapes first, before memory is allocated for the tensors.
            _refuse_copies(files, _check_shapes(files, check_copy))
            if _is_one_tensor(files):
                adapter._read_whole(files.headers[0])
            else:
                _refuse_copies(files, adapter._read_parts(files, check_copy, trainable=trainable))
            if problems := adapter._not_finite(files):
                hint = "Train or save the adapter again; nothing was loaded."
                raise AdapterError(f"{files.folder} is not a valid adapter", problems, hint=hint)
        return adapter.copy(trainable=True) if trainable else adapter

    def copy(self, *, trainable: bool) -> Self:
        """Return a copy with a parameter for each tensor; a trainable one is in at least float32, as new ones are."""
        pairs = {path: self.pair(path) for path in self.sites}
        saved: dict[str, dict[str, Tensor]] = {path: {**self.saved_module(path)} for path in self.saved}
        if trainable:
            pairs = {path: (_float32(a), _float32(b)) for path, (a, b) in pairs.items()}
            saved = {path: {name: _float32(each) for name, each in tensors.items()} for path, tensors in saved.items()}
        copy = type(self).with_sites(
            self.config, self.sites, pairs, origin=self.origin, saved=saved, trainable=trainable
        )
        copy.fan_in_fan_out, copy.paths = self.fan_in_fan_out, self.paths
        copy.tokenizer_files = self.tokenizer_files
        copy.base_modules = self.base_modules
        copy._add_rows(self.added, self._added_rows(), trainable=trainable)
        return copy

    def _read_whole(self, header: safetensors_io.Header) -> None:
        """Take the body of a file as the flat tensor: nothing is copied."""
        body = torch.empty(header.size, dtype=torch.uint8)
        safetensors_io.read_body(header, body.numpy().data)
        dtype = next(iter(header.entries.values())).dtype
        width = safetensors_io.ITEM_BYTES[dtype]
        self.register_parameter(f"flat_{dtype}", nn.Parameter(body.view(DTYPES[dtype]), requires_grad=False))
        self._spans = _SPANS.get(header.entries, lambda: _spans(header.entries, f"flat_{dtype}", width))

    def _read_parts(
        self, files: AdapterFiles, check_copy: Callable[[str, Tensor], str | None], *, trainable: bool
    ) -> dict[str, str | None]:
        """Gather the tensors of all files into a flat tensor per dtype; return what is wrong with copies."""
        reasons: dict[str, str | None] = {}
        parts: dict[str, list[tuple[str, Tensor]]] = {}
        modules = {key: (path, name) for path, keys in files.saved.items() for name, key in keys.items()}
        saved: dict[str, dict[str, Tensor]] = {}
        resized, added = files.resized, dict[str, Tensor]()
        for header in files.headers:
            body = torch.empty(header.size, dtype=torch.uint8)
            safetensors_io.read_body(header, body.numpy().data)
            for key, entry in header.entries.items():
                tensor = body[entry.begin : entry.end].clone().view(DTYPES[entry.dtype]).view(entry.shape)
                if key in modules:
                    path, name = modules[key]
                    saved.setdefault(path, {})[name] = tensor
                    continue
                if key in resized:
                    dimension, rows = resized[key]
                    added[key] = tensor.narrow(dimension, rows, tensor.shape[dimension] - rows)
                    tensor = tensor.narrow(dimension, 0, rows)
                if key not in files.copies:
                    parts.setdefault(entry.dtype, []).append((key, tensor))
                else:
                    reasons[key] = check_copy(key, tensor)
        for dtype, tensors in parts.items():
            self._gather(f"flat_{dtype}", tensors)
        for path, keys in files.saved.items():
            rows = files.base_rows.get(path)
            if trainable and rows is not None:
                continue  # all of its rows are to be trained
            if all(check_copy(key, saved[path][name][:rows]) is None for name, key in keys.items()):
                module = saved.pop(path)
                added |= {key: module[name][rows:] for name, key in keys.items() if rows is not None}
        self._save_modules(saved, trainable=False)
        self._add_rows(added_rows.of_files(files, added), added, trainable=False)
        return reasons

    def _add_rows(self, added: Mapping[str, AddedRows], tensors: Mapping[str, Tensor], *, trainable: bool) -> None:
        """Keep rows beyond the base's, by their keys; those of a pair train with it, those of weights never do."""
        self.added = added
        for each in added.values():
            for key in each.keys:
                trains = trainable and key == each.pair
                value = _float32(tensors[key]) if trains else tensors[key]
                self.register_parameter(_added_name(key), nn.Parameter(value.detach().clone(), requires_grad=trains))

    def _gather(self, name: str, tensors: list[tuple[str, Tensor]]) -> None:
        ends = accumulate(tensor.numel() for _, tensor in tensors)
        spans = {key: (name, end - tensor.numel(), end) for (key, tensor), end in zip(tensors, ends, strict=True)}
        self._spans = {**self._spans, **spans}
        flat = torch.cat([tensor.flatten() for _, tensor in tensors])
        self.register_parameter(name, nn.Parameter(flat, requires_grad=False))

    def _not_finite(self, files: AdapterFiles) -> list[str]:
        problems: list[str] = []
        for name, flat in self._parameters.items():
            if flat is not None and not name.startswith("flat_") and not finite(flat):
                key = PREFIX + name.removesuffix(ADDED).replace("/", ".")
                problems.append(f"{files.spelling(key)} holds NaN or Inf")
            elif flat is not None and not finite(flat):
                spans = {key: span[1:] for key, span in self._spans.items() if span[0] == name}
                problems += [
                    f"{files.spelling(key)} holds NaN or Inf"
                    for key, (start, end) in spans.items()
                    if not finite(flat[start:end])
                ]
        return problems

    @property
    def layout(self) -> FlatLayout | None:
        """Where the pairs lie in the flat tensors; None if the tensors are separate parameters."""
        if self._spans and self._layout is None:
            key = self._spans, self.sites
            self._layout = LAYOUTS.get(key, lambda: FlatLayout.of(*key))
        return self._layout

    def addresses(self) -> Tensor | None:
        """Return the addresses of all pairs, in the order of `layout.paths`: see FlatLayout."""
        return None if self.layout is None else self.layout.addresses(self._parameters)

    def weights(self, path: str) -> LoraWeights | None:
        """Return the module's weights for the update, None if the adapter leaves the module alone."""
        site = self.sites.get(path)
        if site is None:
            return None
        return LoraWeights(*self.pair(path), site.scaling, self.dropout if self.trainable else None, path)

    def pair(self, path: str) -> tuple[Tensor, Tensor]:
        """Return A and B of the module at `path`: the parameters of a trainable adapter, views of a frozen one."""
        site = self.sites[path]
        key_a, key_b = keys_of(path, site)
        return self._tensor(key_a, site.a_shape), self._tensor(key_b, site.b_shape)

    def _tensor(self, key: str, shape: tuple[int, ...]) -> Tensor:
        span = self._spans.get(key)
        parameter = self._parameters[span[0] if span else _parameter_name(key)]
        assert parameter is not None
        return parameter.detach()[span[1] : span[2]].view(shape) if span else parameter

    def saved_module(self, path: str) -> dict[str, nn.Parameter]:
        """Return the parameters of a module that it replaces."""
        return {name: self.get_parameter(_parameter_name(f"{path}.{name}")) for name in self.saved[path]}

    def added_rows(self, key: str) -> nn.Parameter:
        """Return the rows beyond the base's of the tensor of a key."""
        return self.get_parameter(_added_name(key))

    def _added_rows(self) -> dict[str, nn.Parameter]:
        return {key: self.added_rows(key) for added in self.added.values() for key in added.keys}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor under its key in a PEFT file; rows beyond the base's under names of their own."""
        for path, site in self.sites.items():
            yield from zip(keys_of(self.paths.get(path, path), site), self.pair(path), strict=True)
        for path in self.saved:
            written = PREFIX + self.paths.get(path, path)
            yield from ((f"{written}.{name}", tensor) for name, tensor in self.saved_module(path).items())
        yield from ((key + ADDED, tensor) for key, tensor in self._added_rows().items())

    def _written(self) -> dict[str, Tensor]:
        """Return the tensors of a PEFT file; where the adapter adds rows, the base's stand before them.

        Raises:
            AdapterError: it adds rows, and no bank has brought it together with its base.
        """
        tensors = {key: tensor for key, tensor in self.tensors() if not key.endswith(ADDED)}
        for path, added in self.added.items():
            for key in added.keys:
                written = key.replace(path, self.paths.get(path, path), 1)
                first = tensors[written] if key == added.pair else added.base_weight(self.base_modules.get(path), key)
                rows = self.added_rows(key)
                tensors[written] = torch.cat([first.to(rows), rows], added.dimension(key))
        return tensors

    @property
    def trainable(self) -> bool:
        """Whether its tensors are separate parameters that ask for gradients."""
        return not self._spans and any(parameter.requires_grad for parameter in self.parameters())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def save(self, folder: str | Path, *, notes: str = "") -> Path:
        """Write a PEFT folder atomically: whatever happens, `folder` holds the old adapter or this one.

        Other files in an existing folder stay; so does its model card, unless `notes` (markdown) are given. A tokenizer
        of the adapter's own is written too.

        Raises:
            AdapterError: a tensor is not finite, or the folder cannot be written.
        """
        folder = Path(folder)
        problems = [f"{key} holds NaN or Inf" for key, tensor in self.tensors() if not finite(tensor)]
        if problems:
            raise AdapterError("Cannot save this adapter", problems, hint="Train it again with a lower learning rate.")
        if folder.exists() and not folder.is_dir():
            raise AdapterError(f"{folder} is a file", hint="Name a folder.")
        try:
            with new_folder(folder) as fresh:
                (fresh / CONFIG).write_bytes(write_config(self.config, self.origin, fan_in_fan_out=self.fan_in_fan_out))
                tensors = starmap(raw, self._written().items())
                (fresh / TENSORS).write_bytes(safetensors_io.encode(tensors, self.origin.metadata))
                for name, content in self._tokenizer(folder).items():
                    (fresh / name).write_bytes(content)
                if notes or not (folder / CARD).exists():
                    (fresh / CARD).write_text(
                        card.text(self.config, self.origin, modules=len(self.sites), nbytes=self.nbytes, notes=notes),
                        encoding="utf-8",
                    )
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise AdapterError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
        return folder

    def _tokenizer(self, folder: Path) -> dict[str, bytes]:
        """Return the tokenizer's files for a folder; none if it has them, or if they are there no more."""
        if folder.absolute() == self.tokenizer_files.folder:
            return {}
        try:
            return self.tokenizer_files.read()
        except AdapterError as error:  # the tensors are worth more
            log.warning("%s is saved without its tokenizer: %s", folder, error.message)
            return {}

    def describe(self, **provenance: str) -> None:
        """Add to the adapter's provenance, which is saved with the tensors."""
        record = {**self.origin.provenance, **provenance}
        metadata = {**self.origin.metadata, "loradeck": msgspec.json.encode(record, order="sorted").decode()}
        self.origin = replace(self.origin, metadata=metadata)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.moves += 1
        return self

    # A model's state_dict is the base's alone: adapters are saved by `save`, never as part of a checkpoint.
    # pyrefly: ignore [bad-override]  (a narrower result than torch's overloads)
    def state_dict(self, *_: Any, destination: dict[str, Any] | None = None, **__: Any) -> dict[str, Any]:
        """Return nothing: see `save`."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        pass


def raw(key: str, tensor: Tensor) -> tuple[str, str, tuple[int, ...], bytes]:
    """Return a tensor as `safetensors_io.encode` takes it."""
    plain = tensor.detach().cpu().contiguous()
    return key, DTYPE_NAMES[plain.dtype], tuple(plain.shape), plain.view(-1).view(torch.uint8).numpy().tobytes()


_SPANS: Memo[dict[str, safetensors_io.Entry], dict[str, Span]] = Memo()


def _spans(entries: Mapping[str, safetensors_io.Entry], flat: str, width: int) -> dict[str, Span]:
    return {key: (flat, entry.begin // width, entry.end // width) for key, entry in entries.items()}


def _float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _is_one_tensor(files: AdapterFiles) -> bool:
    """Whether the body of the files, as it is, is one flat tensor of all pairs: the usual adapter."""
    dtypes = {entry.dtype for header in files.headers for entry in header.entries.values()}
    return len(files.headers) == 1 and not files.copies and not files.saved and len(dtypes) == 1


def _check_shapes(files: AdapterFiles, check_copy: Callable[[str, Tensor], str | None]) -> dict[str, str | None]:
    """Return what is wrong with the shape of each copy of a weight."""
    shapes = {key: files.entries[key][1].shape for key in files.copies}
    shapes |= {key: (rows, *shapes[key][1:]) for key, (_, rows) in files.resized.items() if key in shapes}
    return {key: check_copy(key, torch.empty(shape, device="meta")) for key, shape in shapes.items()}


def _refuse_copies(files: AdapterFiles, reasons: Mapping[str, str | None]) -> None:
    """Raise an error if there is a reason against any copy of a weight."""
    problems = {key: f"{files.spelling(key)} {reason}" for key, reason in reasons.items() if reason}
    if problems:
        trained = not all(key.endswith(ADAPTED_COPY) for key in problems)
        raise UnsupportedError(
            f"{files.folder} has weights of a base itself, which are not this base's; this is not supported",
            [*problems.values()],
            hint=f"Load the base it was trained on.{' If it trained them too, merge it there with PEFT.' * trained}",
            **({} if trained else ANY_BASE),
        )


def _site_of(config: LoraConfig, path: str, a: Tensor, b: Tensor, kind: str) -> TargetModule:
    r = a.shape[0]
    return TargetModule(kind, r, config.scaling(path, r), tuple(a.shape), tuple(b.shape))


def _parameter_name(key: str) -> str:
    """Return the parameter's name for a key: nn.Module reserves the dot."""
    return key.removeprefix(PREFIX).replace(".", "/")


def _added_name(key: str) -> str:
    """Return the parameter's name for the rows of a tensor that are beyond the base's."""
    return _parameter_name(key) + ADDED
