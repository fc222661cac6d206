"""Work in processes of their own, which take turns: two teams of threads in one process would slow each other down."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

K = TypeVar("K")
T = TypeVar("T")

SETTLING = 2.0  # seconds, after the loop starts or stops


@contextmanager
def worker(prepare: Callable[..., Callable[..., T]], *arguments: Any) -> Generator[Callable[..., T]]:
    """Start a process that prepares some work; yield a function that does it there, and returns what it returns.

    A failure there shows its traceback, and ends here with EOFError.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_answer, args=(theirs, prepare, arguments), daemon=True)
    process.start()
    theirs.close()

    def turn(*request: Any) -> T:
        ours.send(request)
        return ours.recv()

    try:
        ours.recv()  # it is ready
        yield turn
    finally:
        ours.close()
        process.join()


def _answer(connection: Connection, prepare: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    """Do some work for every message, until the connection is closed."""
    work = prepare(*arguments)
    connection.send("ready")
    with suppress(EOFError):
        while True:
            connection.send(work(*connection.recv()))
    os._exit(0)  # without waiting for an engine's threads


def take_turns(turns: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """Return what each turn returned in every round."""
    results: dict[K, list[T]] = {name: [] for name in turns}
    for number in range(rounds):
        for name, result in _round(turns, number).items():
            results[name].append(result)
    return results


def take_turns_beside_a_loop(
    turns: Mapping[K, Callable[[], T]], rounds: int
) -> tuple[dict[K, list[T]], dict[K, list[T]]]:
    """Return what each turn returned in every round: alone, and beside a process that is one endless loop."""
    alone: dict[K, list[T]] = {name: [] for name in turns}
    beside: dict[K, list[T]] = {name: [] for name in turns}
    with _endless_loop() as loop:
        for number in range(rounds):
            for signal_, results in ((signal.SIGSTOP, alone), (signal.SIGCONT, beside)):
                loop.send_signal(signal_)
                time.sleep(SETTLING)
                for name, result in _round(turns, number).items():
                    results[name].append(result)
    return alone, beside


def _round(turns: Mapping[K, Callable[[], T]], number: int) -> dict[K, T]:
    """Take each turn once, beginning with another one in each round."""
    order = [*turns.items()]
    first = number % len(order)
    return {name: turn() for name, turn in order[first:] + order[:first]}


@contextmanager
def _endless_loop() -> Generator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as loop:
        try:
            yield loop
        finally:
            loop.kill()
