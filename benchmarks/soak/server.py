"""The soak of a server: a `loradeck serve` process, openai's client many times, and SIGTERM in the middle of answers.

Tokens are told by the names that log-probabilities have, so that all answers are scored.
"""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.soak.asked import Asked, Ledger, Meaning, Questions, Told
from benchmarks.soak.crowd import Crowd
from benchmarks.soak.engine import Bounds
from benchmarks.soak.memory import Memory
from loradeck import Base
from loradeck.api.logprobs import LogprobFormatter
from loradeck.sampling import Token

LAST = 16  # answers that are on their way when the server is told to end
BEGUN = 4  # of them have begun then


@dataclass
class Session:
    """A server that runs, and what its clients need."""

    url: str
    process: subprocess.Popen[str]
    crowd: Crowd
    ledger: Ledger
    bounds: Bounds
    tokens: dict[str, int]
    """By name."""

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def questions(self, seed: int) -> Questions:
        return Questions(self.crowd, len(self.tokens), seed, longest=self.bounds.longest, answer=self.bounds.answer)


def soak(base: Base, crowd: Crowd, bounds: Bounds, seed: int) -> tuple[Ledger, dict[str, float]]:
    """Ask, go away, load, unload and publish at random; return what happened, and what is left."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "loradeck", "serve", "smollm2-135m", "--dtype", "float32", "--port", "0"]
        command += ["--adapters", str(crowd.store.folder)]
        for own in fields(bounds.config):
            command += [f"--{own.name.replace('_', '-')}", str(getattr(bounds.config, own.name))]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            assert process.stdout is not None
            url = re.search(r"http://[\d.:]+", process.stdout.readline())
            assert url is not None, "the server has not started"
            session = Session(url[0], process, crowd, Ledger(), bounds, names(base))
            figures = asyncio.run(talk(session, seed))
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        figures["left: lines in the server's log"] = len(log.readlines())
    return session.ledger, figures


def names(base: Base) -> dict[str, int]:
    """Return each token's number by its name in log-probabilities."""
    ids = [Token(number, 0.0) for number in range(base.model.config.vocab_size)]
    told = LogprobFormatter(base.tokenizer).completion(ids, [0] * len(ids)).tokens
    found = {name: own.id for name, own in zip(told, ids, strict=True)}
    assert len(found) == len(ids), "two tokens have one name"
    return found


async def talk(session: Session, seed: int) -> dict[str, float]:
    """Have many clients for the time, then end the server while it answers."""
    over, memory = asyncio.Event(), Memory(session.process.pid)
    clients = [asyncio.create_task(client(session, seed + n + 1, over)) for n in range(session.bounds.clients)]
    hand = asyncio.create_task(by_hand(session, seed, over))
    await asyncio.to_thread(memory.watch, session.bounds.seconds)
    over.set()
    for done in await asyncio.gather(*clients, hand, return_exceptions=True):
        if isinstance(done, BaseException):
            session.ledger.fail(done)
    there = await numbers(session)
    until = time.monotonic() + 10  # a request that a client has left is over within a step
    while there["vllm:num_requests_running"] + there["vllm:num_requests_waiting"] and time.monotonic() < until:
        await asyncio.sleep(0.1)
        there = await numbers(session)
    return {
        "loads": there["loradeck_adapter_loads_total"],
        "evictions": there["loradeck_adapter_evictions_total"],
        "prompt tokens found in the prefix cache": there["vllm:prefix_cache_hits_total"]
        / max(there["vllm:prefix_cache_queries_total"], 1),
        **memory.figures(),
        "left: pins": there["pinned"],
        "left: requests": there["vllm:num_requests_running"] + there["vllm:num_requests_waiting"],
        "left: rows, over the budget": there["vllm:kv_cache_usage_perc"],
        "left: bytes of adapters, over the budget": there["loradeck_adapter_resident_bytes"]
        / session.bounds.config.adapter_bytes,
        **await ended(session, seed),
    }


async def client(session: Session, seed: int, over: asyncio.Event) -> None:
    """Ask one question after the other."""
    questions, ledger = session.questions(seed), session.ledger
    async with session.openai() as api:
        while not over.is_set():
            asked = replace(questions.next(), scored=True)
            ledger.count("requests")
            try:
                await ask(session, api, asked, streams=asked.leaves is not None or questions.chance.random() < 0.5)
            except openai.RateLimitError:
                ledger.count("refused")
                await asyncio.sleep(questions.chance.uniform(0, 1))
            except openai.APIError as error:
                ledger.fail(error)


async def ask(
    session: Session, api: openai.AsyncOpenAI, asked: Asked, *, streams: bool, begun: asyncio.Semaphore | None = None
) -> None:
    """Ask, read the answer as far as it is waited for, and keep it; `begun` is told that it has begun."""
    meaning = Meaning.before(session.crowd, asked.weights)
    create: Any = api.completions.create(
        model="+".join(f"{spec}*{weight}" for spec, weight in asked.weights) or "smollm2-135m",
        prompt=[*asked.prompt],
        max_tokens=asked.answer,
        temperature=asked.temperature,
        seed=asked.seed,
        logprobs=0,
        stream=streams,
        extra_body={"ignore_eos": asked.endless},
    )
    if asked.leaves == 0:
        try:
            answer = await asyncio.wait_for(create, 0.3)
        except TimeoutError:
            return session.ledger.count("cancelled")  # before it had begun
        await answer.close()
        return session.ledger.count("cancelled")
    answer = await create
    meaning = meaning.after()
    tokens: list[int] = []
    logprobs: list[float] = []
    finish = ""
    async for event in answer if streams else _once(answer):
        for choice in event.choices:
            if choice.logprobs:
                tokens += [session.tokens[name] for name in choice.logprobs.tokens]
                logprobs += choice.logprobs.token_logprobs
            finish = choice.finish_reason or finish
        if begun is not None and len(tokens) == 1:
            begun.release()
        if len(tokens) == asked.leaves:
            finish = "cancelled"
            await answer.close()
            break
    if meaning.overtaken():
        session.ledger.count("overtaken")
    if not finish or len(logprobs) != len(tokens):
        return session.ledger.fail(EOFError(f"{asked} has come to {len(tokens)} tokens and no end"))
    return session.ledger.keep(Told(asked, [*meaning.routes()], tokens, logprobs, finish))


async def by_hand(session: Session, seed: int, over: asyncio.Event) -> None:
    """Load, unload and publish, over HTTP and beside it."""
    chance, crowd, ledger = random.Random(seed), session.crowd, session.ledger
    with tempfile.TemporaryDirectory() as outside:
        async with httpx.AsyncClient(base_url=session.url, timeout=60) as http:
            while not over.is_set():
                await asyncio.sleep(chance.uniform(0, 2 * session.bounds.pause))
                name = crowd.draw(chance)
                kind = chance.choice(("loads by hand", "unloads by hand", "publishes"))
                number = chance.randrange(2**32, 2**33)
                if kind == "publishes" and chance.random() < 0.5:
                    await asyncio.to_thread(crowd.publish, name, number)
                    ledger.count(kind)
                    continue
                body: dict[str, object] = {"lora_name": name}
                if kind == "publishes":
                    made = await asyncio.to_thread(crowd.adapter(number).save, Path(outside) / str(number))
                    body |= {"lora_path": str(made), "load_inplace": True}
                    crowd.begin(name)
                verb = "unload" if kind == "unloads by hand" else "load"
                reply = await http.post(f"/v1/{verb}_lora_adapter", json=body)
                if kind == "publishes":
                    crowd.done(name)
                if "no room" in reply.text:
                    ledger.count("loads by hand without room")
                    kind = kind if kind == "publishes" else ""  # it is published all the same
                elif reply.status_code != 200 and "loaded" not in reply.text:
                    ledger.fail(RuntimeError(f"{verb} {name}: {reply.status_code} {reply.text}"))
                ledger.count(kind, 1 if kind else 0)


async def ended(session: Session, seed: int) -> dict[str, float]:
    """Tell the server to end while it answers; who has been taken in gets the whole answer, and nobody comes in."""
    begun = asyncio.Semaphore(0)
    questions = session.questions(seed + 10_000)
    async with session.openai() as api:
        last = []
        for _ in range(LAST):
            asked = replace(questions.next(), scored=True, leaves=None, endless=True, answer=session.bounds.answer)
            last.append(asyncio.create_task(ask(session, api, asked, streams=True, begun=begun)))
        session.ledger.count("requests", LAST)
        for _ in range(BEGUN):
            await begun.acquire()
        before = len(session.ledger.told)
        told = time.monotonic()
        session.process.send_signal(signal.SIGTERM)
        refused = 0
        for done in await asyncio.gather(*last, return_exceptions=True):
            if isinstance(done, openai.RateLimitError):
                refused += 1
            elif isinstance(done, BaseException):
                session.ledger.fail(done)
    session.ledger.count("refused", refused)
    code = await asyncio.to_thread(session.process.wait, 60)
    if code:
        session.ledger.fail(ChildProcessError(f"the server has ended with {code}"))
    return {
        "SIGTERM: answers on their way": LAST - refused,
        "SIGTERM: of these whole": len(session.ledger.told) - before,
        "SIGTERM: seconds to the end": time.monotonic() - told,
        "SIGTERM: exit status": code,
    }


async def numbers(session: Session) -> dict[str, float]:
    """Return the server's metrics that have no more than one series, and how many adapters are pinned."""
    async with httpx.AsyncClient(base_url=session.url, timeout=60) as http:
        text = (await http.get("/metrics")).text
    found = {"pinned": 0.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = sample.value
            if sample.name == "loradeck_adapter_loaded" and sample.labels["pinned"] == "true":
                found["pinned"] += sample.value
    return found


async def _once(answer: Any) -> AsyncIterator[Any]:
    yield answer
