"""`loradeck merge`: a base and adapters into a model that transformers loads. Knows files; the bank does the sums."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from loradeck.cli import blend
from loradeck.cli.display.text import shown, size
from loradeck.cli.options import Dtype
from loradeck.errors import BaseModelError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge(base: str, adapter: str, /, *, output: Annotated[Path, Parameter(alias="-o")], dtype: Dtype = "auto") -> None:
    """Fold an adapter, or a blend, into its base and write the model.

    The result is a complete transformers model with its tokenizer. Its weights
    are rounded once, to the base's dtype: `--dtype float32` loses nothing.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        adapter: An adapter's folder, or a blend as in adapters/poet*0.7+adapters/pirate*0.3.
        output: A new folder for the model.
    """
    from loradeck.base.load import Base, quiet
    from loradeck.disk import new_folder
    from loradeck.lora.bank import Bank

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not empty", hint="Name a new folder; nothing was written.")
    if adapter == blend.NONE:
        raise ConfigError("none is no adapter to merge", hint="Name an adapter's folder.")
    blend.check([adapter])
    loaded = Base.load(base, dtype=dtype)
    bank = Bank(loaded.model)
    (entry,) = blend.load(bank, [adapter])
    assert entry is not None
    bank.merge(entry)
    untie(loaded.model)
    try:
        with quiet(), new_folder(output) as fresh:  # writing takes a second, and needs no bar
            loaded.model.save_pretrained(fresh)
            loaded.tokenizer.save_pretrained(fresh)
    except OSError as error:
        raise BaseModelError(f"{output} cannot be written: {error.strerror or error}") from error
    written = sum(file.stat().st_size for file in output.iterdir())
    print(shown(f"{output}: {size(written)}, {str(loaded.model.dtype).removeprefix('torch.')}"))
    print(shown("try: " + shlex.join(["loradeck", "generate", str(output), "Hello!"])))


def untie(model: "PreTrainedModel") -> None:
    """Say in the config that the output head is not the embedding, where a merge into one has made it so.

    Loading would otherwise take one for both, and lose what the merge changed.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
