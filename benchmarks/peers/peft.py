"""PEFT on transformers' generate: rows of several adapters through `adapter_names`, base rows on the bare model."""

import copy
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.peers.workload import Questions


def main() -> None:
    questions = Questions()
    bare: Any = AutoModelForCausalLM.from_pretrained(questions.folder.base, dtype=torch.bfloat16).eval()
    bare.generation_config.eos_token_id = None  # go on past any end
    first, *others = questions.folder.adapters
    options = {"autocast_adapter_dtype": False}  # as they are: PEFT would compute them in float32, which is slower
    adapted: Any = PeftModel.from_pretrained(copy.deepcopy(bare), first, adapter_name=first.name, **options).eval()
    for folder in others:
        adapted.load_adapter(folder, adapter_name=folder.name, **options)

    @torch.inference_mode()
    def generate(prompts: Sequence[list[int]], adapters: Sequence[int | None], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        names = [f"a{adapter:02d}" for adapter in adapters if adapter is not None]
        mixed: dict[str, Any] = {}
        if len(set(names)) > 1:
            mixed["adapter_names"] = names
        elif names:
            adapted.set_adapter(names[0])
        model = adapted if names else bare
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **mixed
        )
        return out[:, ids.shape[1] :].tolist()

    questions.answer(generate, {"peft": version("peft")})


if __name__ == "__main__":
    main()
