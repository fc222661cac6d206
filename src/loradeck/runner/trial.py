"""What a runner must reproduce: the logits that the model itself computes for two prompts, each alone."""

import torch
from transformers import PreTrainedModel

from loradeck.runner.interface import Runner
from loradeck.runner.request import Request, Scheduled

LENGTHS = (7, 5)
CHUNKS = ((4, 1), (2, 4), (1, 0))  # tokens of each prompt in one step after the other
TOLERANCE = {torch.float32: 1e-3}  # share of the logits' norm
HALF_TOLERANCE = 5e-2


class Trial:
    """Two prompts, and a model's own logits for what follows them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._dtype = model.dtype
        vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
        rng = torch.Generator().manual_seed(0)
        self._prompts = [torch.randint(vocabulary, (length,), generator=rng).tolist() for length in LENGTHS]
        with torch.inference_mode():
            self._expected = [
                model(input_ids=torch.tensor([prompt], device=model.device)).logits[0, -1] for prompt in self._prompts
            ]

    def check(self, runner: Runner) -> None:
        """Compare prompts that are read in chunks, side by side, with the model's logits for each alone.

        Raises:
            ValueError: they differ.
        """
        cache = runner.new_cache(runner.token_bytes << 10)
        requests = [Request(prompt) for prompt in self._prompts]
        tolerance = TOLERANCE.get(self._dtype, HALF_TOLERANCE)
        for counts in CHUNKS:
            batch = [Scheduled(request, count) for request, count in zip(requests, counts, strict=True) if count]
            for work in batch:
                cache.reserve(work.request, work.request.computed + work.count)
            for work, logits in zip(batch, runner.run(batch, cache), strict=True):
                if work.ends:
                    alone = self._expected[requests.index(work.request)].float()
                    if not (logits[-1] - alone).norm() <= tolerance * alone.norm():
                        raise ValueError("batched rows differ from the same rows computed alone")
                work.request.computed += work.count
