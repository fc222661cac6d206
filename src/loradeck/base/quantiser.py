"""Plain weights as blocks of a GGUF file, rounded so that the squared error is small.

    Q8_0          w ≈ d q            q in -127 .. 127, d = max |w| / 127, a block of 32 inputs
    Q4_0, Q5_0    w ≈ d (q - h)      q in 0 .. 2 h - 1, h = 8 or 16, a block of 32
    Q4_1, Q5_1    w ≈ d q + m        q in 0 .. 15 or 0 .. 31, a block of 32
    Q4_K          w ≈ d s q - e t    q in 0 .. 15, s and t in 0 .. 63 for each 32 inputs, d and e for a block of 256

d, e and m are float16. Given the codes q, least squares has the best scale in closed form; given the scale, the best
codes are the nearest. The search begins from several ranges of the codes. Codes are chosen last, for the rounded scale.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import torch
from torch import Tensor

from loradeck.base import openmp
from loradeck.errors import BaseModelError
from loradeck.native.quantised import KINDS

PART = 1 << 16  # weights at a time: they and their codes fit a core's cache
FOUR, FIVE = 15, 31  # the largest codes of four and of five bits
GROUP = 32  # inputs that share a scale
TINY = 1e-30
STEPS = 63  # the largest scale of six bits
# Where a search begins: the range of a group spans 15 + width codes and starts at code -start.
RANGES = tuple(product((-0.4, 0.4), (-0.375, -0.125, 0.125, 0.375)))
# The same without a low value: the value farthest from 0 has code sign (h + width), less h.
WIDTHS = tuple(product((-1, 1), (-1, -0.6, -0.2, 0.2, 0.6)))


def quantise(weight: Tensor, kind: str, name: str) -> Tensor:
    """Return a weight (O, I) as blocks of a kind, (O, bytes of a row) in uint8. I is a multiple of the kind's inputs.

    It takes the memory of the result and a few parts of 64 thousand weights.

    Raises:
        BaseModelError: the weight of this name is not finite, or beyond the range of the kind's float16 scales.
    """
    blocks = weight.detach().reshape(-1, KINDS[kind].inputs)
    size = max(1, PART // blocks.shape[1])
    data = torch.empty(len(blocks), KINDS[kind].bytes, dtype=torch.uint8)

    def encode(at: int) -> None:
        part = blocks[at : at + size].float()
        if not all(bool(bound.isfinite()) for bound in part.aminmax()):
            raise BaseModelError(f"{name} has values that are NaN or Inf", hint="Copy all the model's files again.")
        try:
            data[at : at + size] = ENCODERS[kind](part)
        except OverflowError as error:
            raise BaseModelError(
                f"{name} has values beyond the range of {kind}'s scales", hint="Keep this model in bf16 or float32."
            ) from error

    # Each thread computes its own parts, because torch's threads would wait for each other at every small operation.
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=openmp.alone) as threads:
        for _ in threads.map(encode, range(0, len(blocks), size)):
            pass
    return data.view(len(weight), weight.shape[1] // KINDS[kind].inputs * KINDS[kind].bytes)


def _q8_0(blocks: Tensor) -> Tensor:
    """The bytes of gguf's own quantiser, which rounds halves away from zero."""
    scale = blocks.abs().amax(1, keepdim=True) / 127
    values = blocks * _inverse(scale)
    whole = values.abs().floor()
    codes = values.sign() * (whole + (2 * (values.abs() - whole)).floor())
    return torch.cat([_half(scale[:, 0]), codes.to(torch.int8).view(torch.uint8)], 1)


def _symmetric(blocks: Tensor, top: int) -> Tensor:
    x = blocks.T.contiguous()
    scale = _scale(x, (top + 1) // 2).half().float()
    return torch.cat([_half(scale), _bits(_codes(x, scale, -(top + 1) // 2 * scale, top), top)], 1)


def _affine(blocks: Tensor, top: int) -> Tensor:
    x = blocks.T.contiguous()
    scale, low = _scale_and_low(x, top)
    low = low.half().float()
    scale = _slope(x - low, _codes(x, scale, low, top)).half().float()
    return torch.cat([_half(scale), _half(low), _bits(_codes(x, scale, low, top), top)], 1)


def _q4_k(blocks: Tensor) -> Tensor:
    groups = blocks.shape[1] // GROUP
    x = blocks.reshape(-1, GROUP).T.contiguous()
    scale, low = _scale_and_low(x, FOUR, highest=0)
    (d, s), (e, t) = (_six_bits(each.view(-1, groups)) for each in (scale, -low))
    for _ in range(2):
        low = -(e * t).view(-1)
        codes = _codes(x, (d * s).view(-1), low, FOUR)
        s = _steps(_slope(x - low, codes).view(-1, groups), d)
        t = _steps((codes * (d * s).view(-1) - x).mean(0).view(-1, groups), e)
    codes = _codes(x, (d * s).view(-1), -(e * t).view(-1), FOUR)
    pairs = codes.view(GROUP, -1, groups // 2, 2)
    nibbles = _both(pairs[..., 0], pairs[..., 1]).permute(1, 2, 0).reshape(len(blocks), -1)
    return torch.cat([_half(d[:, 0]), _half(e[:, 0]), _twelve_bytes(s, t), nibbles], 1)


ENCODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": partial(_symmetric, top=FOUR),
    "Q4_1": partial(_affine, top=FOUR),
    "Q4_K": _q4_k,
    "Q5_0": partial(_symmetric, top=FIVE),
    "Q5_1": partial(_affine, top=FIVE),
    "Q8_0": _q8_0,
}
"""What turns blocks (n, inputs) of float32 into (n, bytes) of uint8."""


def _scale_and_low(x: Tensor, top: int, highest: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the scale and the low value, at most `highest`, of each group x (32, n): w ≈ scale q + low."""
    mean, size = x.mean(0), len(x)
    centred = x - mean
    least, most = centred.aminmax(dim=0)
    inverse = _inverse(most - least)
    totals, squares, matches = (x.new_empty(len(RANGES), x.shape[1]) for _ in range(3))
    codes, terms = torch.empty_like(x), torch.empty_like(x)
    for at, (width, start) in enumerate(RANGES):
        per_step = (top + width) * inverse
        torch.addcmul(-least * per_step - start, centred, per_step, out=codes).round_().clamp_(0, top)
        torch.sum(codes, 0, out=totals[at])
        torch.sum(torch.mul(codes, codes, out=terms), 0, out=squares[at])
        torch.sum(torch.mul(centred, codes, out=terms), 0, out=matches[at])
    slopes = matches * _inverse(squares - totals * totals / size)
    best = (slopes * matches).argmax(0, keepdim=True)  # where the squared error falls most
    scale, total = (each.gather(0, best)[0] for each in (slopes, totals))
    low = mean - scale * total / size
    if highest is not None:
        over = low > highest
        low = low.clamp(max=highest)
        scale = torch.where(over, (x.amax(0) - low) / top, scale)
    return scale, low


def _scale(x: Tensor, half: int) -> Tensor:
    """Return the scale, of either sign, of each group x (32, n): w ≈ scale (q - half)."""
    least, most = x.aminmax(dim=0)
    inverse = _inverse(torch.where(most > -least, most, least))
    slopes, gains = (x.new_empty(len(WIDTHS), x.shape[1]) for _ in range(2))
    for at, (sign, width) in enumerate(WIDTHS):
        codes = (x * (sign * (half + width) * inverse)).round_().clamp_(-half, half - 1)
        slopes[at] = _slope(x, codes)
        gains[at] = slopes[at] * (x * codes).sum(0)
    return slopes.gather(0, gains.argmax(0, keepdim=True))[0]


def _slope(x: Tensor, codes: Tensor) -> Tensor:
    """Return the scale of each group with the smallest squared error, where x ≈ scale · code."""
    return (x * codes).sum(0) * _inverse((codes * codes).sum(0))


def _codes(x: Tensor, scale: Tensor, low: Tensor, top: int) -> Tensor:
    """Return the nearest codes in 0 .. top."""
    return (x - low).mul_(_inverse(scale)).round_().clamp_(0, top)


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a block's float16 step (n, 1) and the numbers of steps (n, 8) nearest to values of its groups."""
    step = (values.amax(1, keepdim=True) / STEPS).half().float()
    return step, _steps(values, step)


def _steps(values: Tensor, step: Tensor) -> Tensor:
    return (values * _inverse(step)).round_().clamp_(0, STEPS)


def _inverse(x: Tensor) -> Tensor:
    """Return 1 / x, or 0 where x is so small that a float16 of it is 0: all codes are 0 there."""
    return torch.where(x.abs() < TINY, 0, 1 / x)


def _half(x: Tensor) -> Tensor:
    """(n,) as the bytes of float16, (n, 2).

    Raises:
        OverflowError: a value is beyond float16's range.
    """
    half = x.half()
    if not bool(half.isfinite().all()):
        raise OverflowError
    return half.view(torch.uint8).view(-1, 2)


def _bits(codes: Tensor, top: int) -> Tensor:
    """Codes (32, n) as bytes (n, 16 or 20): fifth bits, if there are any, then the lower four of two codes a byte."""
    codes = codes.to(torch.uint8)
    nibbles = _both(*(codes & 15).chunk(2)).T
    if top == FOUR:
        return nibbles
    places = torch.arange(8, dtype=torch.uint8)[:, None]
    fifth = ((codes >> 4).unflatten(0, (4, 8)) << places).sum(1, dtype=torch.uint8)
    return torch.cat([fifth.T, nibbles], 1)


def _both(low: Tensor, high: Tensor) -> Tensor:
    return low.to(torch.uint8) | (high.to(torch.uint8) << 4)


def _twelve_bytes(scales: Tensor, lows: Tensor) -> Tensor:
    """Eight scales and eight lows of six bits (n, 8) as (n, 12): those of the last four groups fill the gaps."""
    s, t = scales.to(torch.uint8), lows.to(torch.uint8)
    first = [each[:, :4] | (each[:, 4:] >> 4 << 6) for each in (s, t)]
    return torch.cat([*first, (s[:, 4:] & 15) | (t[:, 4:] << 4)], 1)
