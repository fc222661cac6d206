"""What a job trains and validates on, read from its recipe's dataset."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain

from transformers import PreTrainedTokenizerBase

from loradeck.base.load import Base
from loradeck.dataset.config import DataConfig
from loradeck.dataset.finding import FIRST
from loradeck.dataset.held_out import held_out
from loradeck.dataset.read import Dataset, SplitExamples, read_dataset
from loradeck.dataset.source import Position
from loradeck.errors import DataError
from loradeck.lora.bank import Bank
from loradeck.lora.manifest import stamp
from loradeck.lora.vocabulary import choices_added_by, rows_of, tokens_added_by
from loradeck.tokenizer_files import TokenizerFiles
from loradeck.train.inputs import read_parent
from loradeck.train.recipe import JobRecipe


@dataclass(frozen=True, slots=True)
class JobData:
    """A job's dataset, and its examples to train and to validate on."""

    dataset: Dataset
    train: SplitExamples
    valid: SplitExamples
    tokenizer: PreTrainedTokenizerBase
    """What encoded them."""


def read_data(
    jobs: Iterable[JobRecipe],
    base: Base,
    bank: Bank,
    on_read: Callable[[Position], None] | None = None,
    *,
    places: int = FIRST,
) -> dict[str, JobData]:
    """Read the data of jobs, by their names; a dataset of several is read once. `on_read` is called after each record.

    An error of a dataset tells the first `places` of each cause.

    Raises:
        DataError: a dataset cannot be trained on, or not with the adapter that a job goes on from.
        AdapterError, ConfigError: the adapter that a job goes on from is not valid, or has other settings.
    """

    @cache
    def read(
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        max_length: int,
        config: DataConfig,
        labels: tuple[str, ...] = (),
    ) -> Dataset:
        return read_dataset(
            source,
            tokenizer,
            max_length,
            config,
            task=base.task,
            labels=labels,
            places=places,
            on_read=on_read,
        )

    data: dict[str, JobData] = {}
    for job in jobs:
        labels = read_parent(job).origin.labels if job.from_ else ()
        tokenizer = _tokenizer(job, base, bank)
        dataset = read(tokenizer, job.data, job.train.max_length, job.reading, labels)
        train, valid = dataset.train, dataset.valid
        if job.valid is not None:
            other = read(tokenizer, job.valid, job.train.max_length, job.reading, dataset.labels)
            valid = other.valid or other.train
        elif not valid and job.train.valid_ratio:
            train, valid = held_out(train, job.train.valid_ratio, job.train.seed)
        data[job.name] = JobData(dataset, train, valid, tokenizer)
        if job.from_ is not None and base.task == "generate":
            _check_targets(data[job.name], job.from_, bank)
    return data


def _check_targets(data: JobData, parent: str, bank: Bank) -> None:
    """Check that a model with an adapter can choose the tokens that it is to be trained on.

    Raises:
        DataError: it has a row of the embedding for one of them, but none of the output head.
    """
    ours, files = bank.vocabulary, bank.check(parent)
    choices = choices_added_by(ours, files)
    if choices >= tokens_added_by(ours, files):
        return
    limit = rows_of([*ours.values()][-1]) + choices
    for example in chain(data.train, data.valid):
        highest = max(label for sequence in example.sequences for label in sequence.labels)
        if highest >= limit:
            token = data.tokenizer.convert_ids_to_tokens(highest)
            raise DataError(
                f"{data.dataset.name} trains on the token {token!r}, but {files.folder.name} has no row of the output "
                "head for it",
                hint="Leave it to the prompts, or go on from an adapter that has both.",
            )


def _tokenizer(job: JobRecipe, base: Base, bank: Bank) -> PreTrainedTokenizerBase:
    """Return what encodes a job's examples: the tokenizer of a parent that adds tokens, else the base's."""
    if job.from_ is None:
        return base.tokenizer
    files = bank.check(job.from_)
    count = tokens_added_by(bank.vocabulary, files)
    if not count:
        return base.tokenizer
    folder = files.folder.absolute()
    return base.adapter_tokenizers.of([replace(TokenizerFiles.of(folder, stamp(folder)), added_tokens=count)])
