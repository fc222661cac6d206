"""How a request's tokens are chosen, from the fields of its body. Knows both sides' words; chooses nothing."""

from dataclasses import replace

from loradeck.api.requests import Generation
from loradeck.serve.request import SamplingParams

SEEDS = 2**64


def sampling_of(
    asked: Generation, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """Return what an engine takes; what was not asked for is OpenAI's default."""

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=asked.min_tokens or 0,
        temperature=given(asked.temperature, 1.0),
        top_p=given(asked.top_p, 1.0),
        top_k=max(asked.top_k or 0, 0),
        min_p=asked.min_p or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        repetition_penalty=given(asked.repetition_penalty, 1.0),
        logit_bias=asked.logit_bias or {},
        seed=asked.seed,
        stop_tokens=frozenset(asked.stop_token_ids or ()),
        stop=asked.stop or (),
        ignore_eos=bool(asked.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def seeded(sampling: SamplingParams, number: int) -> SamplingParams:
    """Return the same for another answer to the same prompt: the next seed, where there is one."""
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + number) % SEEDS)
