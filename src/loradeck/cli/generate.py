"""`loradeck generate`: answer prompts in one batch, each with its own adapter."""

from dataclasses import asdict

from loradeck.base.onednn import cap_kernel_cache
from loradeck.cli import blend
from loradeck.cli.display.text import print_json, printable
from loradeck.cli.options import Adapters, AsJson, Dtype, SamplingOptions, Weights
from loradeck.errors import ConfigError

GREEDY = SamplingOptions()


def generate(
    base: str,
    prompts: list[str],
    /,
    *,
    adapters: Adapters = (),
    sampling: SamplingOptions = GREEDY,
    dtype: Dtype = "auto",
    weights: Weights = "packed",
    as_json: AsJson = False,
) -> None:
    """Answer prompts in one batch, each with its own adapter.

    ADAPTER is a folder, a blend such as adapters/poet*0.7+adapters/pirate*0.3,
    or `none` for the base. Give one for all prompts, or one for each prompt in
    the same order.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        prompts: One or more; put `--` before a prompt that begins with a dash.
    """
    if sampling.top_p != GREEDY.top_p and sampling.temperature == 0:
        raise ConfigError("--top-p needs a temperature above 0", hint="Add --temperature, such as 0.7.")
    texts = [*(adapters or [blend.NONE])]
    if len(texts) == 1:
        texts *= len(prompts)
    if len(texts) != len(prompts):
        raise ConfigError(
            f"the numbers of adapters and prompts differ: {len(adapters)} and {len(prompts)}",
            hint="Give --adapter once for all prompts, or once for each; `none` is the base.",
        )
    blend.check(texts)

    from loradeck import generation
    from loradeck.base.load import Base
    from loradeck.lora.bank import Bank

    cap_kernel_cache()
    loaded = Base.load(base, dtype=dtype, weights=weights)
    bank = Bank(loaded.model)
    answers = generation.generate(loaded, bank, prompts, blend.load(bank, texts), **asdict(sampling))
    rows = list(zip(prompts, texts, answers, strict=True))
    if as_json:
        print_json([{"prompt": prompt, "adapter": text, "answer": answer} for prompt, text, answer in rows])
    elif len(rows) == 1:
        print(printable(answers[0]))
    else:
        print(printable("\n\n".join(f"> {prompt}  [{text}]\n{answer}" for prompt, text, answer in rows)))
