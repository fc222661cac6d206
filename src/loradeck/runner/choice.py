"""Which runner computes a model, found by trying: the compiled step where it can, transformers' modules elsewhere."""

import logging

from transformers import PreTrainedModel

from loradeck.ops import compiler
from loradeck.runner.activations import Activations
from loradeck.runner.interface import Runner
from loradeck.runner.model_runner import ModelRunner
from loradeck.runner.native_batch import no_int8
from loradeck.runner.native_runner import NativeRunner

log = logging.getLogger(__name__)


def runner_of(model: PreTrainedModel, *, enforce_eager: bool = False, activations: Activations = "auto") -> Runner:
    """Return the runner of a model, which is the runner's own from now on: see `base.weights.shared_copy`.

    Raises:
        BaseModelError, LoradeckError: as ModelRunner.
        ConfigError: int8 activations are asked for, and the compiled step cannot compute the model with them.
    """
    eager = ModelRunner(model)
    if enforce_eager:
        if activations == "int8":
            raise no_int8("transformers' modules are enforced")
        return eager
    try:
        runner = NativeRunner(eager, activations)
    except Exception as error:  # what compilers and other people's models raise has no common class
        if activations == "int8":
            raise no_int8(error) from error
        log.info("the step of %s is computed by transformers' modules: %s", type(model).__name__, error)
        return eager
    origin = compiler.origin(runner.native.library)
    rounded = ", with int8 activations" if runner.native.int8 else ""
    log.info("the step of %s is computed natively%s, by a library that was %s", type(model).__name__, rounded, origin)
    return runner
