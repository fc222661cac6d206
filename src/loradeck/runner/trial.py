"""What a runner must reproduce: the logits that the model itself computes for two prompts, each alone."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loradeck.native.model import NativeModel
from loradeck.runner.activations import Activations
from loradeck.runner.interface import Runner
from loradeck.runner.request import Request, Scheduled

LENGTHS = (7, 5)
CHUNKS = ((4, 4), (3, 1))  # tokens of each prompt in two steps; the second has a chunk and a single token, after others
TOLERANCE = {torch.float32: 1e-3}  # share of the logits' norm
HALF_TOLERANCE = 5e-2
INT8_TOLERANCE = 0.2  # more, for the rounding of int8 activations: 0.013 on SmolLM2, 0.087 on Gemma 3 270M

log = logging.getLogger(__name__)


def prompts(model: PreTrainedModel) -> list[list[int]]:
    """Return random prompts for a model, always the same."""
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[union-attr]
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (length,), generator=rng).tolist() for length in LENGTHS]


def own_logits(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the logits (V,) that a model itself computes for what follows each prompt."""
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([text], device=model.device)).logits[0, -1] for text in texts]


def agrees(logits: Tensor, own: Tensor, *, int8: bool = False) -> bool:
    """Whether logits are the model's own to the rounding of its dtype, and of int8 activations if there are some.

    NaN agrees with nothing.
    """
    tolerance = TOLERANCE.get(own.dtype, HALF_TOLERANCE) + INT8_TOLERANCE * int8
    return bool((logits.float() - own.float()).norm() <= tolerance * own.float().norm())


def check_with(native: NativeModel, activations: Activations, check: Callable[[], None]) -> None:
    """Check a native model with plain activations, and with int8 ones if it takes them.

    Where these are only the default, they are given up if they fail.

    Raises:
        ValueError: as `check`.
    """
    int8, native.int8 = native.int8, False
    check()
    if not int8:
        return
    native.int8 = True
    try:
        check()
    except ValueError as error:
        if activations != "auto":
            raise
        log.info("int8 activations are not used: %s", error)
        native.int8 = False


class Trial:
    """Two prompts, and a model's own logits for what follows them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._prompts = prompts(model)
        self._logits = own_logits(model, self._prompts)

    def check(self, runner: Runner, *, int8: bool = False) -> None:
        """Compare prompts that are read in chunks, side by side, with the model's logits for each alone.

        Raises:
            ValueError: they differ.
        """
        cache = runner.new_cache(runner.token_bytes << 10)
        requests = [Request(prompt) for prompt in self._prompts]
        for counts in CHUNKS:
            batch = [Scheduled(request, count) for request, count in zip(requests, counts, strict=True)]
            for work in batch:
                cache.reserve(work.request, work.request.computed + work.count)
            for work, logits in zip(batch, runner.run(batch, cache), strict=True):
                if work.ends and not agrees(logits[-1], self._logits[requests.index(work.request)], int8=int8):
                    raise ValueError("batched rows differ from the same rows computed alone")
                work.request.computed += work.count
