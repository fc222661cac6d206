"""`loradeck generate`: prompts in, answers out, each through its own adapter, as one batch. Only reads and prints."""

from dataclasses import asdict

from loradeck.cli import blend
from loradeck.cli.display.text import print_json, shown
from loradeck.cli.options import Adapters, AsJson, Dtype, Sampling, Weights
from loradeck.errors import ConfigError

GREEDY = Sampling()


def generate(
    base: str,
    prompts: list[str],
    /,
    *,
    adapters: Adapters = (),
    sampling: Sampling = GREEDY,
    dtype: Dtype = "auto",
    weights: Weights = "packed",
    as_json: AsJson = False,
) -> None:
    """Answer prompts, each through its own adapter, as one batch.

    ADAPTER is a folder, a blend as in adapters/poet*0.7+adapters/pirate*0.3,
    or `none` for the base alone. Give one for all prompts, or one for each, in
    their order.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        prompts: One or more; after `--` where one begins with a dash.
    """
    texts = [*(adapters or [blend.NONE])]
    if len(texts) == 1:
        texts *= len(prompts)
    if len(texts) != len(prompts):
        raise ConfigError(
            f"{len(adapters)} adapters for {len(prompts)} prompts",
            hint="Give --adapter once for all prompts, or once for each; `none` is the base alone.",
        )
    blend.check(texts)

    from loradeck.base.load import Base
    from loradeck.generation import generate as answer
    from loradeck.lora.bank import Bank

    loaded = Base.load(base, dtype=dtype, weights=weights)
    bank = Bank(loaded.model)
    answers = answer(loaded, bank, prompts, blend.load(bank, texts), **asdict(sampling))
    rows = list(zip(prompts, texts, answers, strict=True))
    if as_json:
        print_json([{"prompt": prompt, "adapter": text, "answer": said} for prompt, text, said in rows])
    elif len(rows) == 1:
        print(shown(answers[0]))
    else:
        print(shown("\n\n".join(f"> {prompt}  [{text}]\n{said}" for prompt, text, said in rows)))
