"""Which runner computes a model, found by trying: the compiled step where it can, transformers' modules elsewhere."""

import logging

from transformers import PreTrainedModel

from loradeck.ops import compiler
from loradeck.runner.interface import Runner
from loradeck.runner.model_runner import ModelRunner
from loradeck.runner.native_runner import NativeRunner

log = logging.getLogger(__name__)


def runner_of(model: PreTrainedModel, *, enforce_eager: bool = False) -> Runner:
    """Return the runner of a model, which is the runner's own from now on: see `base.weights.shared_copy`.

    Raises:
        BaseModelError, LoradeckError: as ModelRunner.
    """
    eager = ModelRunner(model)
    if enforce_eager:
        return eager
    try:
        runner = NativeRunner(eager)
    except Exception as error:  # what compilers and other people's models raise has no common class
        log.info("the step of %s is computed by transformers' modules: %s", type(model).__name__, error)
        return eager
    origin = compiler.origin(runner.native.library)
    log.info("the step of %s is computed natively, by a library that was %s", type(model).__name__, origin)
    return runner
