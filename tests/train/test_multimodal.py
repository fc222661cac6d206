"""Training on the language model of a multimodal base gives an adapter of the whole model."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.multimodal import FAMILIES, VOCABULARY, text_logits, whole
from transformers import PreTrainedTokenizerFast

from loradeck import Base, LoraConfig
from loradeck.train.config import TrainConfig
from loradeck.train.recipe import JobRecipe, RunRecipe
from loradeck.train.run import Run

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
]
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_was_trained_on_the_whole_model(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    whole(family).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    data = tmp_path / "data.csv"
    data.write_text("prompt,completion\nHi,Ahoy!\nBye,Fair winds\n2+2?,4\nWho are you?,A sailor\n")
    base = Base.load(tmp_path / "base", dtype="float32", device="cpu")
    settings = TrainConfig(batch_size=2, max_steps=4, learning_rate=0.05)
    jobs = tuple(
        JobRecipe(name=name, data=str(data), lora=LoraConfig(r=r), train=settings) for name, r in (("a", 2), ("b", 4))
    )
    run = Run(RunRecipe(base=str(tmp_path / "base"), jobs=jobs), tmp_path / "run", base)
    run.begin()
    run.train()
    for name in "ab":
        assert run.trainer.jobs[name].progress.step == 4
        model = PeftModel.from_pretrained(whole(family), str(run.adapter_folder(name))).eval()
        with torch.no_grad(), run.bank.route(name):
            logits = base.model(input_ids=IDS).logits
        torch.testing.assert_close(text_logits(model, IDS), logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, text_logits(whole(family), IDS), atol=1e-2)
        vision = [module for path, module in model.named_modules() if "lora_A" in path and "vis" in path]
        assert vision == []
