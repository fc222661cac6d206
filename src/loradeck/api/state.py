"""What the routes share: an engine, who may use what on it, and the requests on their way. Knows ids, not shapes."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loradeck.api.errors import HttpError, ending
from loradeck.api.keys import Key, Keys
from loradeck.api.llamacpp_ids import LlamacppIds
from loradeck.api.logprobs import Logprobs
from loradeck.api.model_name import Chosen, ModelNames
from loradeck.api.requests import Generation as GenerationRequest
from loradeck.api.sampling import seeded
from loradeck.api.settings import Settings
from loradeck.errors import BusyError

if TYPE_CHECKING:
    from loradeck.api.metrics import Metrics
    from loradeck.serve.engine import Engine
    from loradeck.serve.generation import Generation
    from loradeck.serve.request import Request, SamplingParams


@dataclass(eq=False)
class ServerState:
    """One server's state."""

    engine: "Engine"
    metrics: "Metrics"
    keys: Keys = field(default_factory=Keys)
    settings: Settings = field(default_factory=Settings)
    numbering: LlamacppIds = field(init=False)
    names: ModelNames = field(init=False)
    logprobs: Logprobs = field(init=False)
    live: "set[Generation]" = field(init=False, default_factory=set)
    """Answers that a client waits for."""
    draining: bool = field(init=False, default=False)
    started: int = field(init=False, default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.numbering = LlamacppIds(self.engine.store)
        self.names = ModelNames(self.engine.base, self.numbering)
        self.logprobs = Logprobs(self.engine.base.tokenizer)
        self.metrics.watch(self.engine, self._requests)

    @property
    def ending(self) -> bool:
        """Whether nothing is taken any more."""
        return self.draining or self.engine.failed

    @property
    def folder(self) -> str:
        """Where the adapters lie."""
        return str(self.engine.store.folder) if self.engine.store else ""

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: the base's weights."""
        return f"fp_{self.engine.base.fingerprint[:10]}"

    def choose(self, key: Key, asked: GenerationRequest) -> Chosen:
        """Return which adapters a request is for, if its key may use them. Asks the disk."""
        chosen = self.names.choose(asked)
        key.check_use(chosen.names)
        return chosen

    def submit(
        self,
        key: Key,
        chosen: Chosen,
        asked: GenerationRequest,
        prompts: Sequence[list[int]],
        samplings: "Sequence[SamplingParams]",
        *,
        continues: bool,
    ) -> "list[Generation]":
        """Submit `n` requests for each prompt to the engine: all or none. Reads the disk.

        `continues` says whether the answers continue the prompts' texts, or begin texts of their own.

        Raises:
            HttpError: 400, too many answers or too long a prompt.
            LoradeckError: the engine rejects a request.
        """
        n = asked.n or 1
        if len(prompts) * n > self.settings.max_choices:
            most = self.settings.max_choices
            raise HttpError(400, f"{len(prompts)} prompts times n={n} are more than {most} answers.", param="n")
        longest = max(map(len, prompts))
        if longest > self.settings.max_prompt:
            raise HttpError(
                400, f"A prompt has {longest} tokens; {self.settings.max_prompt} are allowed.", param="prompt"
            )
        generations: list[Generation] = []
        try:
            for prompt, sampling in zip(prompts, samplings, strict=True):
                for number in range(n):
                    generation = self.engine.submit(
                        prompt,
                        chosen.entry,
                        seeded(sampling, number),
                        tenant=key.name,
                        adapter=chosen.label,
                        continues=continues,
                    )
                    self.live.add(generation)
                    generations.append(generation)
        except BaseException as error:
            self.release(generations)
            if self.ending and isinstance(error, BusyError):
                raise ending() from error
            raise
        return generations

    def release(self, generations: "Iterable[Generation]") -> None:
        """Cancel those that have not ended, and forget them all."""
        for generation in generations:
            generation.cancel()
            self.live.discard(generation)

    def length(self, prompt: Sequence[int], asked: int | None) -> int:
        """Return how many tokens an answer to this prompt may have: what was asked for, up to what there is room for.

        Raises:
            HttpError: 400, the prompt leaves no room.
        """
        context = self.engine.base.context
        room = self.settings.max_output if context is None else context - len(prompt)
        if room < 1 and asked != 0:
            raise HttpError(
                400, f"The prompt has {len(prompt)} tokens, and the base reads and writes {context}.", param="prompt"
            )
        return min(room, self.settings.max_output, room if asked is None else asked)

    def drain(self, seconds: float) -> None:
        """Take nothing new, and let what runs end within so many seconds."""
        self.draining = True
        self.engine.drain(seconds)

    def _requests(self) -> "list[Request]":
        return [generation.request for generation in tuple(self.live) if generation.finish is None]
