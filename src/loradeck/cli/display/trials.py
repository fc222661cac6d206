"""The trials of a sweep, which `--dry-run` prints."""

from loradeck.cli.display.text import columns
from loradeck.train.run import Run


def trial_columns(run: Run) -> str:
    """Return what the trials of a sweep differ in, a line each."""
    rows = [("trial", "learning rate", "r", "parameters")]
    for recipe in run.recipe.jobs:
        parameters = sum(parameter.numel() for parameter in run.bank.parameters(recipe.name))
        rate = run.trainer.jobs[recipe.name].schedule.peak
        rows.append((recipe.name, f"{rate:.2g}", f"{recipe.lora.r}", f"{parameters:,}"))
    return columns(rows, right={1, 2, 3})
