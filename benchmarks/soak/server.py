"""The soak of a server: a `loradeck serve` process, many of openai's clients, and SIGTERM in the middle of answers.

Tokens are identified by their names in log-probabilities, so all requests have log-probabilities.
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

from benchmarks.memory import MemoryTrace
from benchmarks.soak.catalogue import Catalogue
from benchmarks.soak.engine import Limits
from benchmarks.soak.requests import Answer, Ledger, RandomRequests, Request, Resolution
from loradeck import Base
from loradeck.api.logprobs import LogprobFormatter
from loradeck.sampling import Token

LAST = 16  # requests that are running when the server is told to stop
STARTED = 4  # of them have their first token then
PATIENCE = 600.0  # seconds for cancelled requests to end


@dataclass
class Session:
    """A running server, and what its clients need."""

    url: str
    process: subprocess.Popen[str]
    catalogue: Catalogue
    ledger: Ledger
    limits: Limits
    tokens: dict[str, int]
    """By name."""

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def requests(self, seed: int) -> RandomRequests:
        limits = self.limits
        return RandomRequests(
            self.catalogue, len(self.tokens), seed, max_prompt=limits.max_prompt, max_tokens=limits.max_tokens
        )


def soak(base: Base, catalogue: Catalogue, limits: Limits, seed: int) -> tuple[Ledger, dict[str, float]]:
    """Request, cancel, load, unload and publish at random; return what happened, and what is left."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "loradeck", "serve", "smollm2-135m", "--dtype", "float32", "--port", "0"]
        command += ["--adapters", str(catalogue.store.folder)]
        for option in fields(limits.config):
            value = getattr(limits.config, option.name)
            if value != option.default:
                command += [f"--{option.name.replace('_', '-')}", str(value)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            assert process.stdout is not None
            url = re.search(r"http://[\d.:]+", process.stdout.readline())
            assert url is not None, "the server has not started"
            session = Session(url[0], process, catalogue, Ledger(), limits, token_names(base))
            figures = asyncio.run(run(session, seed))
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        figures["left: lines in the server's log"] = len(log.readlines())
    return session.ledger, figures


def token_names(base: Base) -> dict[str, int]:
    """Return each token's number by its name in log-probabilities."""
    tokens = [Token(number, 0.0) for number in range(base.model.config.vocab_size)]
    names = LogprobFormatter(base.tokenizer).completion(tokens, [0] * len(tokens)).tokens
    numbers = {name: token.id for name, token in zip(names, tokens, strict=True)}
    assert len(numbers) == len(tokens), "two tokens have one name"
    return numbers


async def run(session: Session, seed: int) -> dict[str, float]:
    """Run many clients, then stop the server while it answers."""
    stop, memory = asyncio.Event(), MemoryTrace(session.process.pid)
    tasks = [asyncio.create_task(client(session, seed + n + 1, stop)) for n in range(session.limits.clients)]
    tasks.append(asyncio.create_task(administer(session, seed, stop)))
    await asyncio.to_thread(memory.watch, session.limits.seconds, lambda: session.limits.enough(session.ledger))
    stop.set()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException):
            session.ledger.fail(result)
    figures = await metrics(session)
    deadline = time.monotonic() + PATIENCE  # a cancelled request ends within a step
    while running(figures) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        figures = await metrics(session)
    return {
        "loads": figures["loradeck_adapter_loads_total"],
        "evictions": figures["loradeck_adapter_evictions_total"],
        "prompt tokens found in the prefix cache": figures["vllm:prefix_cache_hits_total"]
        / max(figures["vllm:prefix_cache_queries_total"], 1),
        **memory.figures(),
        "left: pins": figures["pinned"],
        "left: requests": running(figures),
        "left: rows, over the budget": figures["vllm:kv_cache_usage_perc"],
        "left: bytes of adapters, over the budget": figures["loradeck_adapter_resident_bytes"]
        / session.limits.config.adapter_bytes,
        **await terminate(session, seed),
    }


def running(figures: dict[str, float]) -> float:
    """Return the requests that a server still has."""
    return figures["vllm:num_requests_running"] + figures["vllm:num_requests_waiting"]


async def client(session: Session, seed: int, stop: asyncio.Event) -> None:
    """Send one request after the other."""
    requests, ledger = session.requests(seed), session.ledger
    async with session.openai() as api:
        while not stop.is_set():
            request = replace(requests.next(), logprobs=True)
            ledger.count("requests")
            try:
                streams = request.cancel_after is not None or requests.rng.random() < 0.5
                await send(session, api, request, streams=streams)
            except openai.RateLimitError:
                ledger.count("refused")
                await asyncio.sleep(requests.rng.uniform(0, 1))
            except openai.APIError as error:
                ledger.fail(error)


async def send(
    session: Session,
    api: openai.AsyncOpenAI,
    request: Request,
    *,
    streams: bool,
    started: asyncio.Semaphore | None = None,
) -> None:
    """Send a request, read its answer until it ends or is cancelled, and add it to the ledger.

    `started` is released at the first token.
    """
    resolution = Resolution.before(session.catalogue, request.weights)
    create: Any = api.completions.create(
        model="+".join(f"{spec}*{weight}" for spec, weight in request.weights) or "smollm2-135m",
        prompt=[*request.prompt],
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        seed=request.seed,
        logprobs=0,
        stream=streams,
        extra_body={"ignore_eos": request.ignore_eos},
    )
    if request.cancel_after == 0:
        try:
            answer = await asyncio.wait_for(create, 0.3)
        except TimeoutError:
            return session.ledger.count("cancelled")  # before it started
        await answer.close()
        return session.ledger.count("cancelled")
    answer = await create
    resolution = resolution.after()
    tokens: list[int] = []
    logprobs: list[float] = []
    finish = ""
    async for event in answer if streams else _once(answer):
        for choice in event.choices:
            if choice.logprobs:
                tokens += [session.tokens[name] for name in choice.logprobs.tokens]
                logprobs += choice.logprobs.token_logprobs
            finish = choice.finish_reason or finish
        if started is not None and len(tokens) == 1:
            started.release()
        if len(tokens) == request.cancel_after:
            finish = "cancelled"
            await answer.close()
            break
    if resolution.is_outdated():
        session.ledger.count("overtaken")
    if not finish or len(logprobs) != len(tokens):
        return session.ledger.fail(EOFError(f"{request} has {len(tokens)} tokens and no end"))
    return session.ledger.add(Answer(request, [*resolution.routes()], tokens, logprobs, finish))


async def administer(session: Session, seed: int, stop: asyncio.Event) -> None:
    """Load, unload and publish, over HTTP and straight into the store."""
    rng, catalogue, ledger = random.Random(seed), session.catalogue, session.ledger
    with tempfile.TemporaryDirectory() as folder:
        async with httpx.AsyncClient(base_url=session.url, timeout=60) as http:
            while not stop.is_set():
                await asyncio.sleep(rng.uniform(0, 2 * session.limits.pause))
                name = catalogue.draw(rng)
                kind = rng.choice(("loads by hand", "unloads by hand", "publishes"))
                number = rng.randrange(2**32, 2**33)
                if kind == "publishes" and rng.random() < 0.5:
                    await asyncio.to_thread(catalogue.publish, name, number)
                    ledger.count(kind)
                    continue
                body: dict[str, object] = {"lora_name": name}
                if kind == "publishes":
                    path = await asyncio.to_thread(catalogue.adapter(number).save, Path(folder) / str(number))
                    body |= {"lora_path": str(path), "load_inplace": True}
                    catalogue.start(name)
                verb = "unload" if kind == "unloads by hand" else "load"
                reply = await http.post(f"/v1/{verb}_lora_adapter", json=body)
                if kind == "publishes" and reply.status_code == 200:
                    catalogue.finish(name)
                elif kind == "publishes":
                    catalogue.give_up(name)
                if "no room" in reply.text:
                    ledger.count("loads by hand without room")
                    kind = ""  # what has no room is not published
                elif reply.status_code != 200 and "loaded" not in reply.text:
                    ledger.fail(RuntimeError(f"{verb} {name}: {reply.status_code} {reply.text}"))
                ledger.count(kind, 1 if kind else 0)


async def terminate(session: Session, seed: int) -> dict[str, float]:
    """Send SIGTERM while the server answers: requests that it has accepted are answered whole, others are refused."""
    started = asyncio.Semaphore(0)
    requests, max_tokens = session.requests(seed + 10_000), session.limits.max_tokens
    async with session.openai() as api:
        tasks = []
        for _ in range(LAST):
            request = replace(requests.next(), logprobs=True, cancel_after=None, ignore_eos=True, max_tokens=max_tokens)
            tasks.append(asyncio.create_task(send(session, api, request, streams=True, started=started)))
        session.ledger.count("requests", LAST)
        for _ in range(STARTED):
            await started.acquire()
        before = len(session.ledger.answers)
        begin = time.monotonic()
        session.process.send_signal(signal.SIGTERM)
        refused = 0
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, openai.RateLimitError):
                refused += 1
            elif isinstance(result, BaseException):
                session.ledger.fail(result)
    session.ledger.count("refused", refused)
    code = await asyncio.to_thread(session.process.wait, 60)
    if code:
        session.ledger.fail(ChildProcessError(f"the server ended with code {code}"))
    return {
        "SIGTERM: answers on their way": LAST - refused,
        "SIGTERM: of these whole": len(session.ledger.answers) - before,
        "SIGTERM: seconds to the end": time.monotonic() - begin,
        "SIGTERM: exit status": code,
    }


async def metrics(session: Session) -> dict[str, float]:
    """Return the server's metrics that have no more than one series, and how many adapters are pinned."""
    async with httpx.AsyncClient(base_url=session.url, timeout=60) as http:
        text = (await http.get("/metrics")).text
    figures = {"pinned": 0.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            figures[sample.name] = sample.value
            if sample.name == "loradeck_adapter_loaded" and sample.labels["pinned"] == "true":
                figures["pinned"] += sample.value
    return figures


async def _once(answer: Any) -> AsyncIterator[Any]:
    yield answer
