"""The loop that trains one adapter: batch -> loss -> gradient -> step. Knows tokens; knows no text and no files.

Later loops train many adapters in one pass; this one is what each of them must equal.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import nn
from torch.optim import AdamW

from loradeck.base.load import Base
from loradeck.errors import ConfigError, DataError, LoradeckError
from loradeck.lora.adapter import Adapter
from loradeck.lora.bank import Bank
from loradeck.train.batching import batches, collate
from loradeck.train.config import TrainConfig
from loradeck.train.example import Example
from loradeck.train.loss import causal_loss
from loradeck.train.schedule import Schedule

BETAS = (0.9, 0.95)  # Tinker's AdamW: the second moment forgets in 20 steps, and many a run of LoRA has but 50
FUSED = ("cpu", "cuda", "mps", "xpu")  # where torch has AdamW as one kernel for all tensors


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step did, and the run up to it."""

    step: int
    """From 1."""
    steps: int
    loss: float
    """Mean over the step's supervised tokens, in nats, before the update."""
    learning_rate: float
    tokens: int
    """Read since the start, padding not counted."""
    seconds: float
    """Since the start."""

    @property
    def tokens_per_second(self) -> float:
        """Mean since the start."""
        return self.tokens / self.seconds


@dataclass(slots=True)
class TrainResult:
    """A run that ended, or was interrupted."""

    losses: list[float] = field(default_factory=list)
    """Of each step, in nats per supervised token."""
    tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    """Whether Ctrl-C ended it early; the adapter is then the one after `steps` whole steps."""

    @property
    def steps(self) -> int:
        """Optimizer steps made."""
        return len(self.losses)


def train(
    base: Base,
    bank: Bank,
    name: str,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    on_step: Callable[[Step], None] | None = None,
) -> TrainResult:
    """Train the resident adapter `name` on examples; the base's weights are not touched.

    The same seed, adapter and examples give bitwise the same adapter on the same machine. The model is in training
    mode meanwhile: dropout of the base, where it has any, is active, as it is in PEFT. KeyboardInterrupt ends the run
    between two steps, and the result says so; the adapter can be saved as after a run that ended.

    Raises:
        DataError: there are no examples.
        ConfigError: an example is longer than the base can read.
        UnknownAdapterError: there is no such adapter.
        AdapterError: the adapter is frozen.
        LoradeckError: the loss or the gradient is NaN or infinite; the adapter is the one before that step.
    """
    _check_examples(base, examples)
    parameters = list(bank.parameters(name))
    schedule = Schedule.of(config, len(examples), base.model.config)
    device = parameters[0].device
    optimizer = AdamW(parameters, betas=BETAS, weight_decay=config.weight_decay, fused=device.type in FUSED)
    groups = islice(batches(examples, config.batch_size, seed=config.seed), schedule.steps)
    result, started = TrainResult(), time.perf_counter()
    with _training(base.model, bank[name], config.seed):
        try:
            for step, group in enumerate(groups):
                batch, rate = collate(group, device), schedule(step)
                for settings in optimizer.param_groups:
                    settings["lr"] = rate
                with bank.route(name):
                    total, supervised = causal_loss(base.model, batch)
                    loss = total / supervised
                    loss.backward()
                norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                _check_finite(name, step, rate, loss.item(), norm.item())
                optimizer.step()  # one kernel where fused: an interrupt comes before it or after
                optimizer.zero_grad()
                result.losses.append(loss.item())
                result.tokens += batch.tokens
                result.seconds = time.perf_counter() - started
                if on_step:
                    on_step(Step(step + 1, schedule.steps, loss.item(), rate, result.tokens, result.seconds))
        except KeyboardInterrupt:
            result.interrupted = True
        finally:
            optimizer.zero_grad()
    return result


@contextmanager
def _training(model: nn.Module, adapter: Adapter, seed: int) -> Iterator[None]:
    """Put a model in training mode and chance under a seed; give both back as they were."""
    mode = model.training
    device = next(adapter.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if adapter.dropout_generator is not None:
            adapter.dropout_generator.manual_seed(seed)
        model.train()
        try:
            yield
        finally:
            model.train(mode)


def _check_examples(base: Base, examples: Sequence[Example]) -> None:
    if not examples:
        raise DataError("there are no examples to train on", mend="Give at least one.")
    longest = max(len(example.tokens) for example in examples)
    if base.context is not None and longest > base.context:
        raise ConfigError(
            f"the longest example has {longest} tokens; {base.name} reads {base.context}",
            mend=f"Set max_length to {base.context} or less.",
        )


def _check_finite(name: str, step: int, rate: float, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise LoradeckError(
            f"training {name!r} diverged at step {step + 1}: the loss is {loss}, its gradient's norm {norm}",
            mend=f"Lower learning_rate, which was {rate:.2g}. The adapter is the one before this step.",
        )
