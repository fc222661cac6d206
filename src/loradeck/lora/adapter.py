"""One adapter: a configuration and its low-rank tensors, on disk a PEFT folder. Knows no model and no bank."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import msgspec
import torch
from torch import Tensor, nn

from loradeck.disk import new_folder
from loradeck.errors import AdapterError
from loradeck.lora import card, safetensors_io
from loradeck.lora.config import LoraConfig
from loradeck.lora.manifest import PREFIX, AdapterFiles, TargetModule, read_folder
from loradeck.lora.memo import Memo
from loradeck.lora.peft import CARD, CONFIG, TENSORS, Origin, write_config
from loradeck.ops.dropout import Dropout
from loradeck.ops.weights import finite

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Adapter(nn.Module):
    """A configuration and, for each module it adapts, a pair A (r, …), B (out, …).

    A trainable adapter holds one parameter per tensor. A frozen one, as it is loaded to be used, holds all tensors
    of a dtype in one flat parameter and shows views of it: no memory beyond its bytes, one read to load, one tensor
    to move.

    Attributes:
        config: the recipe, with its targets resolved.
        sites: what it holds for each module path.
        origin: where it comes from.
        dropout: how it drops its inputs while it is trained; None where lora_dropout is 0.
    """

    def __init__(self, config: LoraConfig, sites: Mapping[str, TargetModule], origin: Origin | None = None) -> None:
        """Begin an adapter without tensors; `of` and `load` are the ways in."""
        super().__init__()
        self.config = config
        self.sites: Mapping[str, TargetModule] = sites
        self.origin = origin or Origin()
        self.fan_in_fan_out = False
        self.dropout = Dropout(config.lora_dropout) if config.lora_dropout > 0 else None  # while it is trainable
        self.moves = 0  # how often its tensors were moved or cast
        self._spans: Mapping[str, tuple[str, int, int]] = {}  # key -> (name of a flat parameter, start, stop)

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

        A two-dimensional pair is taken for a linear layer's; the config's scaling and the tensors' ranks count.
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
        trainable: bool = False,
    ) -> Self:
        """Make an adapter of tensors whose sites are known."""
        adapter = cls(config, sites, origin)
        with torch.inference_mode(False), torch.no_grad():  # see from_listing
            for path, pair in pairs.items():
                for key, tensor in zip(_keys(path, adapter.sites[path]), pair, strict=True):
                    adapter.register_parameter(
                        _parameter_name(key),
                        nn.Parameter(tensor.detach().clone(), requires_grad=trainable),
                    )
        return adapter

    @classmethod
    def load(cls, folder: str | Path, *, trainable: bool = False) -> Self:
        """Read a PEFT folder.

        Raises:
            UnsupportedError: it uses something this library does not implement.
            AdapterError: with every problem found.
        """
        return cls.from_listing(read_folder(folder), trainable=trainable)

    @classmethod
    def from_listing(
        cls,
        listing: AdapterFiles,
        *,
        trainable: bool = False,
        check_copy: Callable[[str, Tensor], str | None] | None = None,
    ) -> Self:
        """Read the tensors of a folder that was listed.

        `check_copy(key, tensor)` says what is wrong with a copy of a weight of the base; without it a copy is refused.
        """
        adapter = cls(listing.config, listing.sites, listing.origin)
        adapter.fan_in_fan_out = bool((listing.origin.written or {}).get("fan_in_fan_out"))
        # A tensor made in inference mode has no version counter and could never be trained or packed.
        with torch.inference_mode(False), torch.no_grad():
            parts: dict[str, list[tuple[str, Tensor]]] = {}
            problems: list[str] = []
            for key in listing.copies:  # by their shapes, before memory is taken for them
                claimed = torch.empty(listing.entries[key][1].shape, device="meta")
                reason = check_copy(key, claimed) if check_copy else "is a copy of a weight of the base"
                problems += [f"{key} {reason}"] if reason else []
            if problems:
                raise _unusable(listing, problems)
            for header in listing.headers:
                body = torch.empty(header.size, dtype=torch.uint8)
                safetensors_io.read_body(header, body.numpy().data)
                if (
                    len(listing.headers) == 1
                    and not listing.copies
                    and len({e.dtype for e in header.entries.values()}) == 1
                ):
                    adapter._adopt(body, header)
                    break
                for key, entry in header.entries.items():
                    tensor = body[entry.begin : entry.end].clone().view(DTYPES[entry.dtype]).view(entry.shape)
                    if key in listing.copies:
                        reason = check_copy(key, tensor) if check_copy else None
                        problems += [f"{key} {reason}"] if reason else []
                    else:
                        parts.setdefault(entry.dtype, []).append((key, tensor))
            for dtype, own in parts.items():
                adapter._gather(dtype, own)
            for name, flat in adapter._parameters.items():
                if flat is not None and not finite(flat):
                    problems += adapter._not_finite(name)
        if problems:
            raise _unusable(listing, problems)
        if trainable:
            return cls.with_sites(
                adapter.config, adapter.sites, {p: adapter.pair(p) for p in adapter.sites},
                origin=adapter.origin, trainable=True,
            )  # fmt: skip
        return adapter

    def _adopt(self, body: Tensor, header: safetensors_io.Header) -> None:
        """Take a body of one dtype as it is."""
        dtype = next(iter(header.entries.values())).dtype
        width = safetensors_io.ITEM_BYTES[dtype]
        self.register_parameter(f"flat_{dtype}", nn.Parameter(body.view(DTYPES[dtype]), requires_grad=False))
        self._spans = _SPANS.get(header.entries, lambda: _spans(header.entries, f"flat_{dtype}", width))

    def _gather(self, dtype: str, tensors: list[tuple[str, Tensor]]) -> None:
        ends = accumulate(tensor.numel() for _, tensor in tensors)
        own = {key: (f"flat_{dtype}", end - t.numel(), end) for (key, t), end in zip(tensors, ends, strict=True)}
        self._spans = {**self._spans, **own}
        flat = torch.cat([tensor.flatten() for _, tensor in tensors])
        self.register_parameter(f"flat_{dtype}", nn.Parameter(flat, requires_grad=False))

    def _not_finite(self, flat_name: str) -> list[str]:
        flat = self._parameters[flat_name]
        return [
            f"{key} holds NaN or Inf"
            for key, (name, start, stop) in self._spans.items()
            if name == flat_name and flat is not None and not finite(flat[start:stop])
        ]

    def pair(self, path: str) -> tuple[Tensor, Tensor]:
        """Return A and B of the module at `path`: the parameters of a trainable adapter, views of a frozen one."""
        site = self.sites[path]
        key_a, key_b = _keys(path, site)
        return self._tensor(key_a, site.a_shape), self._tensor(key_b, site.b_shape)

    def _tensor(self, key: str, shape: tuple[int, ...]) -> Tensor:
        span = self._spans.get(key)
        parameter = self._parameters[span[0] if span else _parameter_name(key)]
        assert parameter is not None
        return parameter.detach()[span[1] : span[2]].view(shape) if span else parameter

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor under its key in a PEFT file."""
        for path, site in self.sites.items():
            yield from zip(_keys(path, site), self.pair(path), strict=True)

    @property
    def trainable(self) -> bool:
        """Whether its tensors are separate parameters that ask for gradients."""
        return not self._spans and any(parameter.requires_grad for parameter in self.parameters())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def content_hash(self) -> str:
        """Return a sha256 of all that the adapter computes with: keys, types, shapes, scalings and values."""
        digest = hashlib.sha256()
        for key, name, shape, content in sorted(self._raw()):
            digest.update(msgspec.json.encode([key, name, shape]))
            digest.update(content)
        digest.update(msgspec.json.encode(sorted((path, site.scaling) for path, site in self.sites.items())))
        return digest.hexdigest()

    def _raw(self) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
        for key, tensor in self.tensors():
            plain = tensor.detach().cpu().contiguous()
            yield key, DTYPE_NAMES[plain.dtype], tuple(plain.shape), plain.view(-1).view(torch.uint8).numpy().tobytes()

    def save(self, folder: str | Path, *, notes: str = "") -> Path:
        """Write a PEFT folder in one step: whatever happens, `folder` holds the old adapter or this one.

        Other files in an older folder stay; an older model card too, unless there are `notes` (markdown) for a new one.

        Raises:
            AdapterError: a tensor is not finite, or the folder cannot be written.
        """
        folder = Path(folder)
        broken = [f"{key} holds NaN or Inf" for key, tensor in self.tensors() if not finite(tensor)]
        if broken:
            raise AdapterError("This adapter is not saved", broken, hint="Train it again with a lower learning rate.")
        if folder.exists() and not folder.is_dir():
            raise AdapterError(f"{folder} is a file", hint="Name a folder.")
        try:
            with new_folder(folder) as fresh:
                (fresh / CONFIG).write_bytes(write_config(self.config, self.origin, fan_in_fan_out=self.fan_in_fan_out))
                (fresh / TENSORS).write_bytes(safetensors_io.encode(self._raw(), self.origin.metadata))
                if notes or not (folder / CARD).exists():
                    (fresh / CARD).write_text(card.text(self, notes), encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            raise AdapterError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
        return folder

    def describe(self, **provenance: str) -> None:
        """Add to the adapter's record of where it comes from; it is saved with the tensors."""
        record = {**self.origin.provenance, **provenance}
        metadata = {**self.origin.metadata, "loradeck": msgspec.json.encode(record, order="sorted").decode()}
        self.origin = replace(self.origin, metadata=metadata)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.moves += 1
        return self

    # A model's state_dict stays the base's own: adapters are saved by `save`, never mixed into a checkpoint.
    # pyrefly: ignore [bad-override]  (a narrower result than torch's overloads)
    def state_dict(self, *_: Any, destination: dict[str, Any] | None = None, **__: Any) -> dict[str, Any]:
        """Return nothing: see `save`."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        pass


_SPANS: Memo[dict[str, safetensors_io.Entry], dict[str, tuple[str, int, int]]] = Memo()


def _spans(entries: Mapping[str, safetensors_io.Entry], flat: str, width: int) -> dict[str, tuple[str, int, int]]:
    return {key: (flat, entry.begin // width, entry.end // width) for key, entry in entries.items()}


def _unusable(listing: AdapterFiles, problems: list[str]) -> AdapterError:
    hint = "Train or save the adapter again; nothing was loaded."
    return AdapterError(f"{listing.folder} cannot be used", problems, hint=hint)


def _site_of(config: LoraConfig, path: str, a: Tensor, b: Tensor, kind: str) -> TargetModule:
    r = a.shape[0]
    return TargetModule(kind, r, config.scaling(path, r), tuple(a.shape), tuple(b.shape))


def _keys(path: str, site: TargetModule) -> tuple[str, str]:
    a, b = site.keys
    return PREFIX + path + a, PREFIX + path + b


def _parameter_name(key: str) -> str:
    """Return a name that nn.Module takes: it reserves the dot."""
    return key.removeprefix(PREFIX).replace(".", "/")
