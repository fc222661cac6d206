"""What a job takes beside the base: bytes of memory and of the disk."""

import math
from dataclasses import dataclass

from loradeck.base.load import Base
from loradeck.lora import init, targets
from loradeck.train.inputs import read_parent
from loradeck.train.job_data import JobData
from loradeck.train.recipe import JobRecipe

FLOAT = 4  # bytes; adapters are trained in float32
KEPT_MODELS = 3  # a job's checkpoints that requests can name


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a job takes; but for `parameters`, in bytes."""

    parameters: int
    """Values of its adapter."""
    memory: int
    """Its adapter, gradients, the optimizer's moments, the best copy and the reference."""
    disk: int
    """At most, while it trains and is published."""

    @property
    def adapter(self) -> int:
        """Its adapter alone, in memory."""
        return FLOAT * self.parameters


def footprint(base: Base, job: JobRecipe, data: JobData) -> Footprint:
    """Return what a job takes. Reads the base's modules.

    Raises:
        TargetError: the job's targets match no module, or one that takes no adapter.
        AdapterError, ConfigError: the adapter that it goes on from is not valid, or has other settings.
    """
    parameters = _parameters(base, job, data) if job.from_ is None else read_parent(job).parameters
    adapter = FLOAT * parameters
    best = 2 if data.valid else 0  # and the last, once it has ended
    reference = 1 if job.from_ is not None and data.dataset.preferences else 0
    checkpoints = 2 * (3 + best)  # a new one is written before the old one is removed
    return Footprint(parameters, adapter * (4 + best + reference), adapter * (checkpoints + KEPT_MODELS + 1 + 2))


def _parameters(base: Base, job: JobRecipe, data: JobData) -> int:
    """Return the number of values of a new adapter."""
    outputs = {"generate": None, "reward": 1}.get(base.task, len(data.dataset.labels))
    layers = base.model.config.get_text_config().num_hidden_layers
    config = init.with_head(base.model, job.adapter_config(layers), outputs)
    kinds = targets.resolve(base.model, config)
    pairs = sum(math.prod(shape) for path, kind in kinds.items() for shape in kind.shapes(config.rank(path)))
    parameters = base.model.named_parameters()
    return pairs + sum(each.numel() for path, each in parameters if config.saved_module(path))
