"""Training in an engine's thread: its bits and those of the streams beside it, and ends of all kinds."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.classifiers import make as make_classifier
from tests.tiny_models import adapter
from transformers import PreTrainedTokenizerFast

from loradeck import AdapterStore, Base
from loradeck.base.fingerprint import fingerprint
from loradeck.base.weights import prepare
from loradeck.dataset.example import UNSUPERVISED, Example, Preference
from loradeck.dataset.labelled_example import LabelledExample
from loradeck.errors import BusyError, ConfigError, Interruption
from loradeck.live.config import LiveConfig
from loradeck.live.live_trainer import LiveTrainer
from loradeck.live.turns import Turns
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.sampling import SamplingParams, Token
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine
from loradeck.serve.pooling_engine import PoolingEngine
from loradeck.train import checkpoint
from loradeck.train.config import TrainConfig
from loradeck.train.trainer import Trainer

WAIT = 120
ALWAYS = LiveConfig(train_slice=1e-6)  # gives way at every pause
LONG = SamplingParams(max_tokens=150, ignore_eos=True)


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """Every test here computes on one thread."""


# ---- jobs


@dataclass
class Spec:
    """A job."""

    train: Sequence[Any]
    valid: Sequence[Any] = ()
    config: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear"))
    checkpointing: bool = False


def examples(count: int, seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 40, (count,), generator=generator).tolist()
    rows = [torch.randint(3, 260, (length,), generator=generator).tolist() for length in lengths]
    return [Example(row, [UNSUPERVISED] * 3 + row[3:]) for row in rows]


def pairs(count: int, seed: int) -> list[Preference]:
    chosen, rejected = examples(count, seed), examples(count, seed + 1000)
    return [
        Preference(one, replace(other, tokens=one.tokens[:3] + other.tokens[3:]))
        for one, other in zip(chosen, rejected, strict=True)
    ]


CONFIG = TrainConfig(learning_rate=1e-2, batch_size=4, max_steps=6, eval_every=2, seed=1)
SPECS = {
    "sft": Spec(examples(14, 1), examples(5, 2), CONFIG),
    "dpo": Spec(pairs(10, 3), pairs(3, 4), replace(CONFIG, learning_rate=1e-3)),
    "checkpointing": Spec(examples(9, 5), examples(3, 6), CONFIG, checkpointing=True),
    "plain": Spec(examples(20, 7), config=replace(CONFIG, max_steps=9, batch_size=3)),
}


class Outcome(NamedTuple):
    """What a job came to: equal for equal bits."""

    losses: list[float]
    validation: dict[int, float]
    tensors: list[bytes]

    @classmethod
    def of(cls, trainer: Trainer, name: str) -> "Outcome":
        job = trainer.jobs[name]
        tensors = [tensor.detach().float().numpy().tobytes() for _, tensor in job.adapter.tensors()]
        return cls(job.progress.losses, job.progress.validation, tensors)


def new_trainer(base: Base, bank: Bank, name: str, spec: Spec) -> Trainer:
    bank.add(
        name, spec.lora, generator=torch.Generator().manual_seed(0), num_labels=3 if base.task == "classify" else None
    )
    trainer = Trainer(base, bank, max_tokens=60, gradient_checkpointing=spec.checkpointing)
    trainer.add(name, spec.train, spec.config, valid=spec.valid)
    return trainer


def alone(base: Base, name: str, spec: Spec) -> Outcome:
    bank = Bank(base.model)
    trainer = new_trainer(base, bank, name, spec)
    for _ in trainer:
        pass
    outcome = Outcome.of(trainer, name)
    bank.detach()
    return outcome


class Jobs:
    """Jobs of a LiveTrainer, their outcomes and ends."""

    def __init__(self, live: LiveTrainer) -> None:
        self.live = live
        self.outcomes: dict[str, Outcome] = {}
        self.ends: dict[str, BaseException | None] = {}
        self.begun: set[str] = set()
        """Those that have taken a pass."""
        self._ended = threading.Condition()

    def passes(self, name: str, spec: Spec, folder: Path | None = None) -> Iterator[int]:
        try:
            trainer = new_trainer(self.live.base, self.live.bank, name, spec)
        except Interruption:  # the trainer tries how the base computes, which has pauses
            for resident in (name, f"{name}.reference"):
                if resident in self.live.bank:
                    self.live.bank.unload(resident)
            raise
        try:
            if folder and (paths := checkpoint.checkpoints(folder)):
                checkpoint.restore(trainer, paths[-1], checkpoint.read(paths[-1]), data={}, parents={})
            for passes in trainer:
                self.begun.add(name)
                yield passes
        except Interruption:
            if folder:
                checkpoint.save(trainer, folder, data={}, parents={}, files={}, keep=1)
            raise
        finally:
            assert all(parameter.grad is None for parameter in trainer.jobs[name].adapter.parameters())
            self.outcomes[name] = Outcome.of(trainer, name)
            self.live.bank.unload(name)

    def join(self, name: str, spec: Spec, folder: Path | None = None) -> None:
        self.ends.pop(name, None)
        self.live.join(name, self.passes(name, spec, folder), partial(self.end, name))  # type: ignore[arg-type]

    def end(self, name: str, error: BaseException | None) -> None:
        with self._ended:
            assert name not in self.ends
            self.ends[name] = error
            self._ended.notify_all()

    def wait(self, *names: str) -> None:
        with self._ended:
            assert self._ended.wait_for(lambda: all(name in self.ends for name in names), WAIT)


# ---- requests


class Asked(NamedTuple):
    prompt: list[int]
    adapter: str | None
    sampling: SamplingParams


def questions(seed: int) -> Iterator[Asked]:
    rng = random.Random(seed)
    while True:
        yield Asked(
            [rng.randrange(3, 260) for _ in range(rng.randint(1, 40))],
            rng.choice([None, "a0", "a1"]),
            SamplingParams(
                max_tokens=rng.randint(1, 20), temperature=rng.choice([0.0, 0.8]), seed=rng.randrange(99), logprobs=2
            ),
        )


def submit(engine: Engine, asked: Asked) -> Iterator[Token]:
    return engine.submit(asked.prompt, asked.adapter, asked.sampling)


class Clients:
    """Threads that ask one question after the other, and all that they were answered."""

    def __init__(self, engine: Engine, count: int) -> None:
        self.answers: list[tuple[Asked, list[Token]]] = []
        self._engine, self._done = engine, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(count)]

    def _ask(self, seed: int) -> None:
        pause = random.Random(seed)
        for asked in questions(seed):
            self.answers.append((asked, [*submit(self._engine, asked)]))
            if self._done.wait(pause.choice([0, 0, 0.002, 0.02])):
                return

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def store(tmp_path: Path, base: Base) -> AdapterStore:
    store = AdapterStore(tmp_path / "store")
    for number in range(2):
        store.publish(f"a{number}", adapter(base.model, number, 2 + number))
    return store


@contextmanager
def opened(
    base: Base, store: AdapterStore | None = None, config: LiveConfig = ALWAYS, **settings: Any
) -> Iterator[Jobs]:
    with Engine(base, store, EngineConfig(max_rows=4, max_step_tokens=16, **settings)) as engine:
        yield Jobs(LiveTrainer(engine, config))


def engine_of(jobs: Jobs) -> Engine:
    engine = jobs.live._engine
    assert isinstance(engine, Engine)
    return engine


def until(condition: Callable[[], bool]) -> bool:
    """Whether a condition holds within two minutes."""
    end = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def differences(engine: Engine, clients: Clients) -> list[Asked]:
    """What clients were answered otherwise than it is answered now.

    The compiled step gives the same bits in any batch. Where transformers' modules compute, the likeliest tokens count.
    """
    exact = engine._runner.is_batch_invariant(())
    return [
        asked
        for asked, answer in clients.answers
        if (exact and [*submit(engine, asked)] != answer)
        or (
            not (exact or asked.sampling.temperature)
            and [token.id for token in submit(engine, asked)] != [token.id for token in answer]
        )
    ]


# ---- the laws


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        *(("sft", weights) for weights in ("plain", "packed", "int8", "int4")),
        ("dpo", "packed"),
        ("checkpointing", "int8"),
    ],
)
def test_training_and_streams_are_bit_for_bit_what_they_are_alone(
    base: Base, store: AdapterStore, kind: str, weights: Any
) -> None:
    prepare(base.model, weights)
    spec = SPECS[kind]
    expected = alone(base, "job", spec)
    with opened(base, store) as jobs:
        with Clients(engine_of(jobs), 2) as clients:
            jobs.join("job", spec)
            jobs.wait("job")
        assert jobs.ends == {"job": None}
        assert jobs.outcomes["job"] == expected
        assert clients.answers
        jobs.live.close()
        assert not differences(engine_of(jobs), clients)


def test_steps_through_transformers_modules_are_served_within_a_pass(base: Base, store: AdapterStore) -> None:
    """They have a bank, attention and a mode of autograd of their own, within those of the pass."""
    expected = alone(base, "job", SPECS["checkpointing"])
    with opened(base, store, enforce_eager=True) as jobs:
        with Clients(engine_of(jobs), 2) as clients:
            jobs.join("job", SPECS["checkpointing"])
            jobs.wait("job")
        assert jobs.outcomes["job"] == expected
        jobs.live.close()
        assert not differences(engine_of(jobs), clients)


def test_rows_for_pooling_are_served_within_a_pass(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_classifier("bert", "classify", 3, 1).eval().requires_grad_(False)
    base = Base(model, tiny_tokenizer, "tiny", "tiny", fingerprint(model), task="classify")
    spec = Spec([LabelledExample([5, 6, n], [n % 3]) for n in range(7, 19)], config=replace(CONFIG, max_steps=8))
    spec.lora = LoraConfig(r=4)
    expected = alone(base, "job", spec)
    rows = [[5, 9, 33, 7], [8, 2, 90]]
    with PoolingEngine(base) as engine:
        before = [answer.result() for answer in engine.submit(rows)]
        jobs = Jobs(LiveTrainer(engine, ALWAYS))
        jobs.join("job", spec)
        beside = [answer.result() for _ in range(10) for answer in engine.submit(rows)]
        jobs.wait("job")
        assert all(torch.equal(result, before[at % 2]) for at, result in enumerate(beside))
        assert jobs.outcomes["job"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_jobs_that_come_and_go_do_not_change_each_other(base: Base, store: AdapterStore, seed: int) -> None:
    expected = {name: alone(base, name, spec) for name, spec in SPECS.items()}
    rng = random.Random(seed)
    names = rng.sample([*SPECS], len(SPECS))
    with opened(base, store) as jobs:
        jobs.join("gone", replace(SPECS["plain"], config=replace(CONFIG, max_steps=10_000, eval_every=None)))
        with Clients(engine_of(jobs), 1):
            assert until(lambda: "gone" in jobs.begun)
            for name in names:
                jobs.join(name, SPECS[name])
                [*submit(engine_of(jobs), next(questions(rng.randrange(99))))]
            jobs.live.leave("gone")
            jobs.wait("gone", *names)
        assert isinstance(jobs.ends.pop("gone"), Interruption)
        assert jobs.ends == dict.fromkeys(names)
        del jobs.outcomes["gone"]
        assert jobs.outcomes == expected


# ---- the ends


class Counted:
    """Counts pauses, and does something at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, do: Callable[[], object]) -> None:
        self.count, pause = 0, Turns.pause

        def counted(turns: Turns, serve: Callable[[], bool]) -> None:
            self.count += 1
            if self.count == at:
                do()
            pause(turns, serve)

        monkeypatch.setattr(Turns, "pause", counted)


def pauses_of(base: Base, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many pauses a job has."""
    with monkeypatch.context() as patch, opened(base) as jobs:
        counted = Counted(patch, 0, lambda: None)
        jobs.join("job", spec)
        jobs.wait("job")
    return counted.count


@pytest.mark.parametrize("kind", ["sft", "dpo", "checkpointing"])
def test_a_job_that_leaves_at_any_pause_resumes_to_the_same_bits(
    base: Base, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of a forward or backward pass, an evaluation, or the reference's."""
    spec = replace(SPECS[kind], config=replace(CONFIG, max_steps=4))
    expected, last = alone(base, "job", spec), pauses_of(base, spec, monkeypatch)
    for at in random.Random(0).sample(range(2, last), 6):
        folder = tmp_path / f"{at}"
        with opened(base) as jobs, monkeypatch.context() as patch:
            counted = Counted(patch, at, lambda jobs=jobs: jobs.live.leave("job"))
            jobs.join("job", spec, folder)
            jobs.wait("job")
            assert counted.count <= at + 1, "it went on after it was to leave"
            if jobs.ends["job"] is not None:  # it was not the job's last pause
                assert isinstance(jobs.ends["job"], Interruption)
                jobs.join("job", spec, folder)
                jobs.wait("job")
            assert jobs.ends == {"job": None}
            assert jobs.outcomes["job"] == expected, at


def test_a_job_that_fails_within_a_pass_fails_alone(
    base: Base, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = alone(base, "good", SPECS["sft"])
    with opened(base) as jobs:

        def fail() -> None:
            assert jobs.live._current is not None
            jobs.live._current.name = f"{jobs.live._current.name}"
            raise RuntimeError("out of memory")

        jobs.join("bad", SPECS["plain"])
        Counted(monkeypatch, 60, fail)  # the first pass is the bad job's
        jobs.join("good", SPECS["sft"])
        jobs.wait("bad", "good")
        assert str(jobs.ends.pop("bad")) == "out of memory"
        assert jobs.ends == {"good": None}
        assert jobs.outcomes["good"] == expected
        assert len([*engine_of(jobs).stream([5, 6], None, SamplingParams(max_tokens=3, ignore_eos=True))]) == 3
        assert "bad" in caplog.text


def test_a_job_that_diverges_ends_alone(base: Base) -> None:
    expected = alone(base, "good", SPECS["sft"])
    with opened(base) as jobs:
        jobs.join(
            "bad", replace(SPECS["plain"], config=replace(CONFIG, learning_rate=1e9, schedule="constant", max_steps=50))
        )
        jobs.join("good", SPECS["sft"])
        jobs.wait("bad", "good")
        assert jobs.outcomes["good"] == expected


def test_an_end_that_fails_hurts_nobody(base: Base) -> None:
    def fail(error: BaseException | None) -> None:
        raise ValueError("of the end")

    def passes() -> Iterator[None]:
        yield

    with opened(base) as jobs:
        jobs.live.join("bad", passes(), fail)  # type: ignore[arg-type]
        jobs.join("good", SPECS["sft"])
        jobs.wait("good")
        assert jobs.ends == {"good": None}


@pytest.mark.parametrize("closes", ["the trainer", "the engine", "the engine, drained"])
def test_a_close_ends_jobs_within_a_piece(base: Base, closes: str, tmp_path: Path) -> None:
    spec = replace(SPECS["sft"], config=replace(CONFIG, max_steps=10_000, eval_every=5_000))
    with opened(base) as jobs:
        engine = engine_of(jobs)
        jobs.join("one", spec, tmp_path / "one")
        jobs.join("two", spec, tmp_path / "two")
        assert until(lambda: jobs.begun == {"one", "two"})
        stream = engine.submit([5, 6], sampling=LONG)
        for _ in range(20):
            next(stream)
        if closes == "the trainer":
            jobs.live.close()
            assert len([*stream]) == 130, "the engine goes on"
        else:
            if closes.endswith("drained"):
                engine.drain(WAIT)
            engine.close()
        assert {name: type(end) for name, end in jobs.ends.items()} == {"one": Interruption, "two": Interruption}
        assert all(checkpoint.checkpoints(tmp_path / name) for name in ("one", "two"))
        assert not any(module._forward_hooks or "forward" in vars(module) for module in base.model.modules())
        with pytest.raises(BusyError):
            jobs.join("three", spec)
        with pytest.raises(BusyError):
            jobs.live.call(lambda: None)
        jobs.live.close()  # again
        if closes == "the trainer":
            again = Jobs(LiveTrainer(engine, ALWAYS))
            again.join("one", SPECS["sft"])
            again.wait("one")
            assert again.ends == {"one": None}


def test_an_engine_that_fails_interrupts_its_jobs(base: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("of the engine")

    with opened(base) as jobs:
        jobs.join(
            "one", replace(SPECS["sft"], config=replace(CONFIG, max_steps=10_000, eval_every=5_000)), tmp_path / "one"
        )
        assert until(lambda: jobs.begun == {"one"})
        monkeypatch.setattr(engine_of(jobs)._loop, "_schedule", fail)
        stream = engine_of(jobs).submit([5, 6], sampling=LONG)
        jobs.wait("one")
        assert isinstance(jobs.ends["one"], Interruption)
        assert checkpoint.checkpoints(tmp_path / "one")
        with pytest.raises(Exception, match="the engine failed"):
            list(stream)


# ---- calls


def test_calls_are_made_in_the_engines_thread(base: Base) -> None:
    def fail() -> None:
        raise ValueError("of the call")

    with opened(base) as jobs:
        assert jobs.live.call(threading.get_ident).result(WAIT) == engine_of(jobs)._loop._thread.ident
        with pytest.raises(ValueError, match="of the call"):
            jobs.live.call(fail).result(WAIT)
        jobs.join("job", SPECS["sft"])
        assert jobs.live.call(lambda: "between passes").result(WAIT) == "between passes"
        jobs.wait("job")


def test_a_name_trains_once_at_a_time(base: Base) -> None:
    with opened(base) as jobs:
        jobs.join("job", replace(SPECS["sft"], config=replace(CONFIG, max_steps=10_000, eval_every=5_000)))
        with pytest.raises(ConfigError, match="'job' is training already"):
            jobs.live.join("job", jobs.passes("job", SPECS["sft"]), print)  # type: ignore[arg-type]
        jobs.live.leave("job")
        jobs.live.leave("nobody")
        jobs.wait("job")


def test_without_jobs_the_thread_sleeps(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    work = LiveTrainer.work

    def counted(live: LiveTrainer, serve: Callable[[], bool]) -> bool:
        calls.append(work(live, serve))
        return calls[-1]

    monkeypatch.setattr(LiveTrainer, "work", counted)
    with opened(base) as jobs:
        jobs.join("job", SPECS["plain"])
        jobs.wait("job")
        for _ in range(50):
            jobs.live.call(lambda: None).result(WAIT)
        passes = SPECS["plain"].config.max_steps
        assert passes is not None
        # A pass or a call each, the job's end, and each time that it looked and found nothing before it slept.
        assert len(calls) <= 2 * (passes + 2 + 50) + 2


@pytest.mark.parametrize(
    "settings",
    [
        {"train_share": 0.0},
        {"train_share": 1.5},
        {"train_share": float("nan")},
        {"train_slice": -1.0},
        {"train_tokens": 0},
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LiveConfig(**settings)
