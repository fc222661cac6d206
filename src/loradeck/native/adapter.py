"""An adapter's weights as the step reads them: A with padded inputs, B in tiles of 16 outputs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from loradeck.native.blocks import FORMATS, OUTPUTS, pad
from loradeck.native.library import CPairing
from loradeck.native.model import NativeModel
from loradeck.native.slots import SLOTS
from loradeck.ops.weights import LoraWeights

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class NativeAdapter:
    """The pairs of an adapter at a model's matrices.

    Attributes:
        pairings: the C structures, (layers, slots).
        ranks: the rank at each of them.
    """

    def __init__(self, model: NativeModel, weights: Mapping[str, LoraWeights]) -> None:
        """`weights` are those of the modules that it adapts, by path.

        Raises:
            ValueError: it adapts a module that is not one of the model's matrices.
        """
        table = model.table
        self._memory: list[Tensor] = []
        self.pairings = (CPairing * (len(table.layers) * len(SLOTS)))()
        self.ranks = [0] * len(self.pairings)
        paths = set()
        for index, layer in enumerate(table.layers):
            for number, slot in enumerate(SLOTS):
                linear = layer.linears.get(slot)
                pair = weights.get(linear.path) if linear else None
                if linear is None or pair is None:
                    continue
                paths.add(linear.path)
                outputs, inputs = model.widths[slot]
                same = pair.a.dtype == pair.b.dtype and pair.a.dtype in FLOATS
                dtype = pair.a.dtype if same else torch.float32
                a = pair.a.detach().to(dtype).reshape(pair.r, inputs.parts, inputs.size)
                b = pair.b.detach().to(dtype)[linear.start : linear.start + linear.outputs]
                b = pad(b.reshape(outputs.parts, outputs.size, pair.r), outputs.parts, outputs.padded, pair.r)
                at = index * len(SLOTS) + number
                self.ranks[at] = pair.r
                self.pairings[at] = CPairing(
                    r=pair.r,
                    format=FORMATS[dtype],
                    a=self._address(pad(a, pair.r, inputs.parts, inputs.padded)),
                    b=self._address(b.reshape(-1, OUTPUTS, pair.r).transpose(1, 2)),
                    scaling=pair.scaling,
                )
        if other := weights.keys() - paths:
            raise ValueError(f"it adapts {min(other)}")

    def _address(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._memory.append(tensor)
        return tensor.data_ptr()
