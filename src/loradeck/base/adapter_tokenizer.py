"""Which tokenizer an adapter's rows have: its own where its folder has one, else the base's.

The files are untrusted: they are bounded, nothing of them is run, and templates are rendered in transformers' sandbox.
"""

import copy
import hashlib
import json
import logging
import math
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import TypeVar
from weakref import WeakValueDictionary

from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from loradeck.base.pretrained import pretrained_tokenizer, quiet
from loradeck.disk import is_settled
from loradeck.errors import AdapterError, BaseModelError
from loradeck.tokenizer_files import (
    ADDITIONS,
    CONFIG,
    HINT,
    SPECIAL_TOKENS,
    TEMPLATE,
    VOCABULARIES,
    TokenizerFiles,
    digest_of,
)

KNOWN_FOLDERS = 1 << 14  # whose content's hash is remembered; about a kilobyte each
KNOWN_CONTENTS = 64  # whose tokenizer is kept; one takes up to some 50 MB, unless its vocabulary is another's too
PROBE = [{"role": "user", "content": "?"}]

K = TypeVar("K")
V = TypeVar("V")

log = logging.getLogger(__name__)


class AdapterTokenizers:
    """The tokenizers of the adapters of one base. Any thread may ask for one; the first to do so waits for its load.

    Files of the same content are one tokenizer; one that equals the base's is the base's.
    """

    def __init__(self, base: PreTrainedTokenizerBase, config: PretrainedConfig | None = None) -> None:
        """`config` is the model's; without it a tokenizer may have any ids."""
        self.base = base
        self._config = config
        self._ids = math.inf if config is None else _ids(base, config)
        self._lock, self._loading = Lock(), Lock()
        self._digests: OrderedDict[TokenizerFiles, str] = OrderedDict()
        self._tokenizers: OrderedDict[str, PreTrainedTokenizerBase] = OrderedDict()
        self._failures: OrderedDict[TokenizerFiles, tuple[str, str]] = OrderedDict()
        self._equals: WeakValueDictionary[str, PreTrainedTokenizerBase] = WeakValueDictionary()
        self._remarked = False

    def of(self, adapters: Iterable[TokenizerFiles]) -> PreTrainedTokenizerBase:
        """Return the tokenizer of a row of these adapters: the one that all of them have, else the base's.

        Raises:
            AdapterError: an adapter's own tokenizer cannot be used.
        """
        tokenizers = [self._tokenizer(files) for files in adapters] or [self.base]
        if all(tokenizer is tokenizers[0] for tokenizer in tokenizers):
            return tokenizers[0]
        if not self._remarked:
            self._remarked = True
            log.warning("a blend of adapters with different tokenizers or chat templates has those of the base")
        return self.base

    def _tokenizer(self, files: TokenizerFiles) -> PreTrainedTokenizerBase:
        if not files.names:
            return self.base
        with self._lock:
            digest = _recent(self._digests, files) or ""
            tokenizer, failure = _recent(self._tokenizers, digest), _recent(self._failures, files)
        if failure is not None:
            message, hint = failure
            raise AdapterError(message, hint=hint)
        if tokenizer is None:
            digest, tokenizer = self._checked(files)
            if is_settled(files.stamp):
                with self._lock:
                    _remember(self._digests, files, digest, KNOWN_FOLDERS)
        return tokenizer

    def _checked(self, files: TokenizerFiles) -> tuple[str, PreTrainedTokenizerBase]:
        """Return the hash of the files and their tokenizer; why it cannot be used is remembered."""
        try:
            with self._loading:  # one at a time: each takes memory
                contents = files.read()
                tokenizer = self._of_contents(files, contents)
                self._check_ids(files, tokenizer)
            _check_template(files, tokenizer)  # without the lock: a template may take any time
        except AdapterError as error:
            if is_settled(files.stamp) and not isinstance(error.__cause__, OSError):
                with self._lock:
                    _remember(self._failures, files, (error.message, error.hint), KNOWN_FOLDERS)
            raise
        return digest_of(contents), tokenizer

    def _of_contents(self, files: TokenizerFiles, contents: Mapping[str, bytes]) -> PreTrainedTokenizerBase:
        """Return the tokenizer of these contents; what they leave out is the base's.

        Raises:
            AdapterError: it cannot be loaded.
        """
        if not contents:
            return self.base
        digest = digest_of(contents)
        with self._lock:
            tokenizer = _recent(self._tokenizers, digest)
        if tokenizer is not None:
            return tokenizer
        if TEMPLATE in contents:  # many adapters differ in nothing else
            others = {name: content for name, content in contents.items() if name != TEMPLATE}
            tokenizer = copy.copy(self._of_contents(files, others))
            tokenizer.chat_template = contents[TEMPLATE].decode()
        else:
            tokenizer = self._load_files(files, contents)
            tokenizer.chat_template = tokenizer.chat_template or self.base.chat_template
        tokenizer = self._shared(tokenizer)
        with self._lock:
            _remember(self._tokenizers, digest, tokenizer, KNOWN_CONTENTS)
        return tokenizer

    def _load_files(self, files: TokenizerFiles, contents: Mapping[str, bytes]) -> PreTrainedTokenizerBase:
        own_vocabulary = not VOCABULARIES.isdisjoint(contents)
        # Loaded from a copy, for another process may replace the files, and transformers would look for others beside.
        with tempfile.TemporaryDirectory(prefix="loradeck-") as folder, quiet():
            if not (own_vocabulary and CONFIG in contents):
                self.base.save_pretrained(folder)
                (Path(folder) / TEMPLATE).unlink(missing_ok=True)
                for name in VOCABULARIES | ADDITIONS if own_vocabulary else [SPECIAL_TOKENS]:
                    (Path(folder) / name).unlink(missing_ok=True)
            for name, content in contents.items():
                (Path(folder) / name).write_bytes(content)
            try:
                return pretrained_tokenizer(files.folder, folder, config=self._config)
            except BaseModelError as error:
                raise AdapterError(error.message, hint=HINT) from error

    def _check_ids(self, files: TokenizerFiles, tokenizer: PreTrainedTokenizerBase) -> None:
        token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
        if number >= self._ids + files.added_tokens:
            more = f", the adapter's {files.added_tokens} more" if files.added_tokens else ""
            raise AdapterError(
                f"the tokenizer in {files.folder} has the token {token[:64]!r} with the id {number}, and the base's "
                f"embedding has {self._ids} rows{more}",
                hint="Save the adapter with the embedding of its resized base: PEFT has the option "
                "save_embedding_layers.",
            )

    def _shared(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Return an equal tokenizer if there is one; else this one, with the vocabulary of one that has the same."""
        if getattr(tokenizer, "backend_tokenizer", None) is None:  # it is written in Python; such are rare
            return tokenizer
        if not self._equals and getattr(self.base, "backend_tokenizer", None) is not None:
            vocabulary = _vocabulary_digest(self.base)
            self._equals[vocabulary] = self._equals[_digest(self.base, vocabulary)] = self.base
        vocabulary = _vocabulary_digest(tokenizer)
        whole = _digest(tokenizer, vocabulary)
        if (equal := self._equals.get(whole)) is not None:
            return equal
        if (other := self._equals.setdefault(vocabulary, tokenizer)) is not tokenizer:
            tokenizer._tokenizer = other._tokenizer  # the compiled part, which takes nearly all of the memory
        self._equals[whole] = tokenizer
        return tokenizer


def _ids(base: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """Return how many ids there are: the rows of the embedding, or more if the base's own tokenizer has more."""
    return max(getattr(config.get_text_config(), "vocab_size", 0), 1 + max(base.get_vocab().values(), default=0))


def _check_template(files: TokenizerFiles, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template with an error of syntax. One that rejects the trial message may accept others."""
    if tokenizer.chat_template is None:
        return
    try:
        tokenizer.apply_chat_template(PROBE, tokenize=False)
    except TemplateSyntaxError as error:
        name = TEMPLATE if TEMPLATE in files.names else CONFIG
        raise AdapterError(f"{files.folder / name}, line {error.lineno}: {error.message}", hint=HINT) from error
    except Exception:
        return


def _vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of how a tokenizer splits texts and joins tokens."""
    compiled: Tokenizer = tokenizer.backend_tokenizer
    if compiled.truncation is not None or compiled.padding is not None:  # of a training; each call sets its own
        compiled = Tokenizer.from_str(compiled.to_str())
        compiled.no_truncation()
        compiled.no_padding()
    return hashlib.sha256(compiled.to_str().encode()).hexdigest()


def _digest(tokenizer: PreTrainedTokenizerBase, vocabulary: str) -> str:
    """Return the sha256 of all that texts and their tokens depend on, given that of the vocabulary."""
    parts = [
        vocabulary,
        tokenizer.special_tokens_map,
        sorted(tokenizer.all_special_ids),
        tokenizer.chat_template,
        tokenizer.clean_up_tokenization_spaces,
        tokenizer.split_special_tokens,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _recent(table: OrderedDict[K, V], key: K) -> V | None:
    if key in table:
        table.move_to_end(key)
    return table.get(key)


def _remember(table: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > most:
        table.popitem(last=False)
