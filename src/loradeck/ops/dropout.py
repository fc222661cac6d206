"""LoRA dropout: which inputs of an adapter are dropped."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

# Random bits per element, two elements to a word of 31 bits: a third of the time of one float each on a CPU, and p is
# only rounded to 2⁻¹⁵. (Words of 63 bits are no faster, and Metal has none.)
BITS = 15


@dataclass(eq=False, slots=True)
class Dropout:
    """One adapter's dropout of what goes into its A: an element is zero with probability p, else x / (1 - p).

    With a seed, a mask depends on the seed and the layer's path only (on one kind of device, for one shape), not on the
    rest of the batch, on what ran before, or on how often a layer is computed again. Set a new seed for every forward;
    with gradient checkpointing, after the backward pass. Without a seed, each mask is the generator's next draw.
    """

    p: float
    """The probability, 0 <= p < 1."""
    generator: torch.Generator | None = None
    """Draws the masks while `seed` is None; torch's global generator if None."""
    seed: int | None = None
    """Any integer."""
    share: tuple[int, int, int] | None = None
    """Where other processes compute the rest of a batch: how many of its rows (or of equal parts of its rows) come
    before these, how many these are, and how many there are in all. The masks are then these rows' of the batch's."""

    @property
    def scale(self) -> float:
        """The factor for kept elements, so that the mean is unchanged."""
        return 1 / (1 - self.p)

    def keep(self, shape: Sequence[int], path: str, device: torch.device) -> Tensor:
        """Return the mask of the layer at `path` for an input of this shape: a bool tensor, True where kept."""
        seed = self.seed
        if seed is None:
            home = self.generator.device if self.generator else torch.device("cpu")
            seed = int(torch.randint(2**62, (), generator=self.generator, device=home))
        # Not hash(): Python's hash of a string differs from process to process.
        digest = blake2b(f"{seed} {path}".encode(), digest_size=8).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest))
        before, here, total = self.share or (0, 1, 1)
        rows = shape[0] // here
        shape = (rows * total, *shape[1:])
        count = torch.Size(shape).numel()
        words = torch.empty((count + 1) // 2, dtype=torch.int32, device=device).random_(generator=generator)
        bits = words.view(torch.int16).bitwise_and_(2**BITS - 1)[:count]
        bits = bits.view(*shape)[rows * before : rows * (before + here)]
        return bits >= min(round(self.p * 2**BITS), 2**BITS - 1)


def dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    """Return x with zeros where `keep` is False, not scaled; x itself if `keep` is None."""
    # Multiplying a float by a bool takes four times as long as by a byte cast to float.
    return x if keep is None else keep.view(torch.uint8).to(x.dtype).mul_(x)
