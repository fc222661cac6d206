"""Training with PEFT: in a plain loop, and with transformers' Trainer. Batches are padded to the longest example.

Both keep the order of the examples and use AdamW with the settings of loradeck.train.job.
"""

import tempfile
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import AdamW

from loradeck.dataset.example import Example
from loradeck.train.batching import collate
from loradeck.train.job import BETAS


class Plain:
    """The usual loop: forward with labels, backward, clip, step."""

    def __init__(self, model: nn.Module, adapter: Path, rate: float) -> None:
        self.device = next(model.parameters()).device
        self.model = PeftModel.from_pretrained(model, adapter, is_trainable=True, torch_device=str(self.device)).train()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = AdamW(self.parameters, lr=rate, betas=BETAS, weight_decay=0.0, fused=True)

    def step(self, examples: Sequence[Example]) -> float:
        """Make one optimizer step and return its loss."""
        batch = {name: tensor.to(self.device) for name, tensor in padded(examples).items()}
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class WithTrainer:
    """transformers' Trainer; it owns its loop, and calls `after_step` with the loss of each step."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Path,
        rate: float,
        steps: Sequence[Sequence[Example]],
        after_step: Callable[[float], None],
    ) -> None:
        peft = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        peft.config.use_cache = False
        self.folder = tempfile.TemporaryDirectory()
        arguments = transformers.TrainingArguments(
            output_dir=self.folder.name,
            max_steps=len(steps),
            per_device_train_batch_size=len(steps[0]),
            train_sampling_strategy="sequential",
            learning_rate=rate,
            lr_scheduler_type="constant",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=True,
        )
        # pyrefly: ignore [bad-argument-type]  (any sequence works)
        self.trainer = _Trainer(peft, arguments, padded, train_dataset=[*chain(*steps)])
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.trainer.add_callback(_AfterStep(lambda: after_step(float(self.trainer.loss))))

    def run(self) -> None:
        """Make all steps."""
        self.trainer.train()
        self.folder.cleanup()


class _Trainer(transformers.Trainer):
    loss: Tensor

    def training_step(self, *arguments: Any, **settings: Any) -> Tensor:
        self.loss = super().training_step(*arguments, **settings)
        return self.loss


class _AfterStep(transformers.TrainerCallback):
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.callback()


def padded(examples: Sequence[Example]) -> dict[str, Any]:
    """Return a batch for transformers' models; labels of prompts and padding are -100."""
    batch = collate(examples, packed=False)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
