"""`loradeck merge`: a base and an adapter, or a blend, as one transformers model."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from loradeck.cli import blend
from loradeck.cli.display.text import format_size, printable
from loradeck.cli.options import AnyBase, Dtype, Task
from loradeck.cli.output import check_writable
from loradeck.errors import BaseModelError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge(
    base: str,
    adapter: str,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    any_base: AnyBase = False,
    task: Task = "generate",
    dtype: Dtype = "auto",
) -> None:
    """Merge an adapter or a blend into its base, as a new model.

    The result is a complete transformers model with its tokenizer, or the
    adapter's if its folder has one. Its weights are rounded once, to the base's
    dtype; `--dtype float32` loses nothing.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        adapter: An adapter's folder, or a blend such as adapters/poet*0.7+adapters/pirate*0.3.
        output: A new folder for the model.
    """
    from loradeck.base.load import Base
    from loradeck.base.pretrained import quiet
    from loradeck.disk import new_folder
    from loradeck.generation import tokenizers_of
    from loradeck.lora.bank import Bank

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not empty", hint="Give a new folder; nothing was written.")
    if adapter == blend.NONE:
        raise ConfigError("there is no adapter to merge", hint="Give an adapter's folder instead of `none`.")
    files = blend.read([adapter])
    check_writable(output)
    loaded = Base.load(base, dtype=dtype, task=task)
    bank = Bank(loaded.model)
    (weights,) = blend.load(bank, [adapter], files, any_base=any_base)
    assert weights is not None
    (tokenizer,) = tokenizers_of(loaded, bank, [weights])
    bank.merge(weights)
    untie(loaded.model)
    name_labels(loaded.model, [each.origin.labels for each in files.values()])
    try:
        with quiet(), new_folder(output) as fresh:  # no progress bar for a second of writing
            loaded.model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
    except OSError as error:
        raise BaseModelError(f"cannot write {output}: {error.strerror or error}") from error
    nbytes = sum(file.stat().st_size for file in output.iterdir())
    print(printable(f"{output}: {format_size(nbytes)}, {str(loaded.model.dtype).removeprefix('torch.')}"))
    words = ["generate", str(output), "Hello!"] if task == "generate" else ["serve", str(output), "--task", task]
    print(printable("try: " + shlex.join(["loradeck", *words])))


def untie(model: "PreTrainedModel") -> None:
    """Record in the config that a merge has untied the output head from the embedding.

    Otherwise a load would use one weight for both, and lose the merge.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def name_labels(model: "PreTrainedModel", labels: Sequence[tuple[str, ...]]) -> None:
    """Record the labels of a merged head in the config, where all adapters that have names for them have the same."""
    names = [*dict.fromkeys(each for each in labels if each)]
    if len(names) == 1 and len(names[0]) == model.config.num_labels:
        model.config.id2label = dict(enumerate(names[0]))
        model.config.label2id = {label: at for at, label in enumerate(names[0])}
