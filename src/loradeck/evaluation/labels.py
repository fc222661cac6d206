"""What classifiers say, compared with the labels of a dataset: accuracy and F1, label by label."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

from loradeck.base.load import Base
from loradeck.errors import ConfigError, shorten
from loradeck.lora.adapter import Adapter
from loradeck.lora.bank import Bank
from loradeck.lora.routing import RouteEntry, weights_of

OUTSIDE = "O"  # the tag of words that are in no entity


@dataclass(frozen=True, slots=True)
class LabelReport:
    """How well one label was found; precision, recall and F1 are 0 where there is nothing to divide by."""

    label: str
    count: int
    """How often the dataset has it."""
    predicted: int
    """How often it was the most likely one."""
    correct: int
    """How often it was that where the dataset has it."""
    precision: float
    recall: float
    f1: float

    @classmethod
    def of(cls, label: str, count: int, predicted: int, correct: int) -> "LabelReport":
        """Return the report on a label from its counts."""
        precision, recall = _share(correct, predicted), _share(correct, count)
        return cls(label, count, predicted, correct, precision, recall, _share(2 * correct, count + predicted))


def label_reports(references: Sequence[str], predictions: Sequence[str]) -> list[LabelReport]:
    """Return a report on each label that the dataset has or that was predicted, in the order of their names."""
    counts, predicted = Counter(references), Counter(predictions)
    correct = Counter(one for one, other in zip(references, predictions, strict=True) if one == other)
    names = sorted(counts.keys() | predicted.keys())
    return [LabelReport.of(name, counts[name], predicted[name], correct[name]) for name in names]


def macro_f1(reports: Collection[LabelReport]) -> float:
    """Return the mean of the labels' F1."""
    return fmean(report.f1 for report in reports)


def micro_f1(reports: Collection[LabelReport]) -> float | None:
    """Return the F1 of all tags but O together; None without it: then it is the accuracy."""
    inside = [report for report in reports if report.label != OUTSIDE]
    if len(inside) in (0, len(reports)):
        return None
    sums = (sum(getattr(report, name) for report in inside) for name in ("correct", "count", "predicted"))
    correct, count, predicted = sums
    return _share(2 * correct, count + predicted)


def label_names(base: Base, bank: Bank, entry: RouteEntry) -> tuple[str, ...]:
    """Return the names of the labels of a route's head, by its outputs; of one without names, 0, 1, 2 and so on.

    Raises:
        ConfigError: a blend of heads with different labels.
    """
    names = {_names(base, bank[name]) for name, _ in weights_of(entry)} or {_of_base(base)}
    if len(names) > 1:
        raise ConfigError("a blend of adapters with different labels", hint="Blend adapters of the same labels.")
    return names.pop()


def check_labels(labels: Sequence[str], names: Sequence[str], what: str) -> None:
    """Raise a ConfigError if a dataset has labels that a head does not have."""
    unknown = [label for label in labels if label not in names]
    if unknown:
        raise ConfigError(
            f"{what} does not have the label{'s' * (len(unknown) > 1)} {', '.join(map(shorten, unknown[:5]))} of the "
            f"dataset; it has {', '.join(map(shorten, names[:5]))}{', …' * (len(names) > 5)}",
            hint="Evaluate it on data with its own labels.",
        )


def _names(base: Base, adapter: Adapter) -> tuple[str, ...]:
    if adapter.origin.labels:
        return adapter.origin.labels
    weights = [tensor for path in adapter.saved for tensor in adapter.saved_module(path).values() if tensor.dim() == 2]
    return _of_base(base) if not weights else tuple(map(str, range(weights[-1].shape[0])))


def _of_base(base: Base) -> tuple[str, ...]:
    """Return the names in the base's configuration, of which transformers' LABEL_0 is none."""
    names = base.model.config.id2label or {}
    return tuple(name.removeprefix("LABEL_") for _, name in sorted(names.items()))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
