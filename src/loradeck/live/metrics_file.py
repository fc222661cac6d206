"""A job's metrics as the CSV that OpenAI's clients read."""

import csv
import io

from loradeck.train.events import Evaluation, Step
from loradeck.train.history import JobHistory

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")  # OpenAI's
OURS = ("learning_rate", "grad_norm", "tokens")


def metrics_csv(history: JobHistory) -> bytes:
    """Return a row for each step; without times, so that equal runs give equal files."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*COLUMNS, *OURS))
    evaluations = {evaluation.step: evaluation for evaluation in history.evaluations}
    writer.writerows(_row(step, evaluations.get(step.step)) for step in history.steps)
    return text.getvalue().encode()


def _row(step: Step, evaluation: Evaluation | None) -> tuple[object, ...]:
    valid = (None, None) if evaluation is None else (evaluation.loss, evaluation.accuracy)
    return step.step, step.loss, step.accuracy, *valid, step.learning_rate, step.grad_norm, step.tokens
