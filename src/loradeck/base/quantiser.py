"""From plain weights to the blocks of GGUF files.

O outputs   I inputs
"""

import torch
from torch import Tensor

from loradeck.base.matmul import blocks
from loradeck.native.quantised import KINDS


def quantise(weight: Tensor, kind: str) -> Tensor:
    """Return a weight (O, I), I a multiple of the kind's, as uint8 (O, bytes of a row)."""
    outputs, inputs = weight.shape
    data = torch.empty(outputs, inputs // KINDS[kind].inputs * KINDS[kind].bytes, dtype=torch.uint8)
    for rows in blocks(weight):
        data[rows] = QUANTISERS[kind](weight[rows].detach().float().unflatten(1, (-1, KINDS[kind].inputs))).flatten(1)
    return data


def _q8_0(groups: Tensor) -> Tensor:
    """Scale · code, |code| <= 127: (…, 32) -> uint8 (…, 34)."""
    scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
    codes = (groups / scale.float().clamp_min(1e-30)).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), -1)


QUANTISERS = {"Q8_0": _q8_0}
