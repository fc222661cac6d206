"""Which inputs of an adapter are dropped. Knows seeds, places and shapes; knows no adapter and no layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

# Chance per element, two to a word of 31 random bits: a third of the time of one float for each on a CPU, and p is
# rounded to 2⁻¹⁵ only. (Words of 63 bits are no faster, and Metal draws none.)
BITS = 15


@dataclass(eq=False, slots=True)
class Dropout:
    """One adapter's dropout of what goes into its A: an element is zero with probability p, else x / (1 - p).

    With a seed, a mask is a function of the seed and the layer's place alone (on one kind of device, for one shape):
    whoever else is in the batch, whatever ran before, however often a layer is computed again. Set it anew at every
    forward, and where the backward pass computes layers again (gradient checkpointing), only after that. Without a
    seed, masks follow one another as the generator draws.
    """

    p: float
    """From 0 to below 1."""
    generator: torch.Generator | None = None
    """Draws one mask after another while there is no seed; torch's global one if None."""
    seed: int | None = None
    """Any whole number."""

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by, so that the mean stays."""
        return 1 / (1 - self.p)

    def keep(self, shape: Sequence[int], place: str, device: torch.device) -> Tensor:
        """Return which elements of an input of this shape the layer at `place` keeps, as bool."""
        seed = self.seed
        if seed is None:
            home = self.generator.device if self.generator else torch.device("cpu")
            seed = int(torch.randint(2**62, (), generator=self.generator, device=home))
        # A digest, because Python's hash() of a string is another one in each process.
        digest = blake2b(f"{seed} {place}".encode(), digest_size=8).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest))
        count = torch.Size(shape).numel()
        words = torch.empty((count + 1) // 2, dtype=torch.int32, device=device).random_(generator=generator)
        chances = words.view(torch.int16).bitwise_and_(2**BITS - 1)[:count]
        return (chances >= min(round(self.p * 2**BITS), 2**BITS - 1)).view(*shape)


def dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    """Return x with zeros where `keep` is False, not yet scaled; x itself where nothing is dropped."""
    # A float times a bool takes four times as long as the same by way of bytes.
    return x if keep is None else keep.view(torch.uint8).to(x.dtype).mul_(x)
