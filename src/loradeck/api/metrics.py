"""Prometheus metrics under vLLM's names, so that its dashboards and routers work, and of the busiest adapters.

Counts what the engine reports through its `Observer`, and asks for the rest when the metrics are read.
"""

import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loradeck.api.job_metrics import job_metrics
from loradeck.errors import BusyError
from loradeck.serve.stats import GenerationStats

if TYPE_CHECKING:
    from loradeck.live.live_training import LiveTraining
    from loradeck.runner.request import Finish, Request
    from loradeck.serve.engine import Engine
    from loradeck.serve.pooling_engine import PoolingEngine

# vLLM's buckets, in seconds, so that quantiles are comparable.
# fmt: off
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
INTER_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
)
# fmt: on
FINISHED_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "failed": "error"}  # ours -> vLLM's
MAX_LISTED = 100  # adapters in the value of a label
BASE_LABEL, BLEND_LABEL, OTHER_LABEL = "<base>", "<blend>", "<other>"  # no adapter's name has these characters


class Metrics(Collector):
    """The metrics of one engine. Pass them to the engine as its observer, and to the application."""

    def __init__(self, base: str, top_adapters: int = 100) -> None:
        """Count nothing yet.

        Args:
            base: The value of vLLM's label `model_name`.
            top_adapters: Maximum number of adapters with series of their own.
        """
        self.registry = CollectorRegistry()
        self.labels = AdapterLabels(top_adapters, self._remove_series)
        self._base = base
        self._engine: Engine | PoolingEngine | None = None
        self._live: Callable[[], Collection[Request]] = tuple
        self._training: LiveTraining | None = None
        of_base = {"labelnames": ("model_name",), "registry": self.registry}
        of_adapter = {"labelnames": ("adapter",), "registry": self.registry}
        self._prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens of admitted requests.", **of_base)
        self._generated_tokens = Counter("vllm:generation_tokens", "Generated tokens.", **of_base)
        self._finished = Counter(
            "vllm:request_success",
            "Finished requests, by reason.",
            labelnames=("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._first_token = Histogram(
            "vllm:time_to_first_token_seconds", "From arrival.", buckets=FIRST_TOKEN_BUCKETS, **of_base
        )
        self._inter_token = Histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens.", buckets=INTER_TOKEN_BUCKETS, **of_base
        )
        self._latency = Histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end.", buckets=REQUEST_BUCKETS, **of_base
        )
        self._queue_time = Histogram(
            "vllm:request_queue_time_seconds", "From arrival to admission.", buckets=REQUEST_BUCKETS, **of_base
        )
        self._adapter_requests = Counter("loradeck_adapter_requests", "Admitted requests.", **of_adapter)
        self._adapter_prompt_tokens = Counter("loradeck_adapter_prompt_tokens", "Prompt tokens.", **of_adapter)
        self._adapter_generated_tokens = Counter(
            "loradeck_adapter_generation_tokens", "Generated tokens.", **of_adapter
        )
        self._adapter_first_token = Histogram(
            "loradeck_adapter_time_to_first_token_seconds",
            "From arrival, loading included.",
            buckets=FIRST_TOKEN_BUCKETS,
            **of_adapter,
        )
        self.registry.register(self)

    def watch(
        self,
        engine: "Engine | PoolingEngine",
        live: Callable[[], "Collection[Request]"],
        training: "LiveTraining | None" = None,
    ) -> None:
        """Read this engine's state, the requests that `live` returns, and the jobs, whenever the metrics are read."""
        self._engine = engine
        self._live = live
        self._training = training

    def read(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    # ---- the engine's observer; called in its thread

    def admitted(self, request: "Request") -> None:
        """Count a request and its prompt."""
        self.labels.count(request.adapter)
        label = self.labels.label(request.adapter)
        self._prompt_tokens.labels(self._base).inc(len(request.prompt))
        self._queue_time.labels(self._base).observe(request.admitted - request.arrived)
        self._adapter_requests.labels(label).inc()
        self._adapter_prompt_tokens.labels(label).inc(len(request.prompt))

    def token(self, request: "Request", since: float) -> None:
        """Count a token that came `since` seconds after the one before it, or after the request's arrival."""
        label = self.labels.label(request.adapter)
        self._generated_tokens.labels(self._base).inc()
        self._adapter_generated_tokens.labels(label).inc()
        if request.generated <= 1:
            self._first_token.labels(self._base).observe(since)
            self._adapter_first_token.labels(label).observe(since)
        else:
            self._inter_token.labels(self._base).observe(since)

    def finished(self, request: "Request", finish: "Finish") -> None:
        """Count the end of a request."""
        self._finished.labels(self._base, FINISHED_REASONS[finish]).inc()
        self._latency.labels(self._base).observe(time.monotonic() - request.arrived)

    # ---- prometheus_client's collector; called when the metrics are read

    def describe(self) -> Iterator[Metric]:
        """Announce nothing: what `collect` yields depends on an engine, which comes later."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the state of the engine and of its adapters."""
        if self._engine is None:
            return
        stats, adapters = self._engine.stats, self._engine.adapter_cache
        yield self._gauge("vllm:num_requests_running", "Requests in the batch.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", stats.waiting)
        if isinstance(stats, GenerationStats):
            yield self._gauge("vllm:kv_cache_usage_perc", "From 0 to 1.", stats.kv_bytes / stats.kv_budget)
            yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
            yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found.", stats.prefix_hits)
            yield self._counter("vllm:spec_decode_num_drafts", "Drafts of requests in a step.", stats.drafts)
            yield self._counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", stats.draft_tokens)
            yield self._counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.", stats.accepted_tokens)
        yield from self._requests(self._engine.config.max_rows)
        loaded = GaugeMetricFamily(
            "loradeck_adapter_loaded", "Versions in memory.", labels=("adapter", "tier", "pinned")
        )
        residents = adapters.residents()
        for resident in residents:
            self.labels.count(resident.spec, 0)
        values = [
            (self.labels.label(resident.spec), resident.tier, str(resident.pinned).lower()) for resident in residents
        ]
        for value, count in Tally(values).items():
            loaded.add_metric(value, count)
        yield loaded
        memory = GaugeMetricFamily("loradeck_adapter_bytes", "Memory of adapters.", labels=("tier",))
        for tier in ("device", "memory"):
            memory.add_metric((tier,), sum(resident.nbytes for resident in residents if resident.tier == tier))
        yield memory
        yield GaugeMetricFamily("loradeck_adapter_resident_bytes", "On the device.", adapters.nbytes)
        yield CounterMetricFamily("loradeck_adapter_loads", "Adapters loaded.", adapters.loads)
        yield CounterMetricFamily("loradeck_adapter_load_failures", "Loads that failed.", adapters.load_failures)
        yield CounterMetricFamily("loradeck_adapter_load_seconds", "Time spent loading.", adapters.load_seconds)
        yield CounterMetricFamily("loradeck_adapter_evictions", "Adapters evicted.", adapters.evictions)
        if self._training is not None:
            with suppress(BusyError):  # it is shutting down
                yield from job_metrics(self._training.jobs)

    def _requests(self, max_running: int) -> Iterator[Metric]:
        """Yield the running and waiting adapters; at most `max_running` requests, and so adapters, run at once."""
        live = self._live()
        running = [request.adapter for request in live if request.admitted]
        waiting = [request.adapter for request in live if not request.admitted]
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Seconds since 1970; the labels are the information.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        info.add_metric((str(max_running), _names(running), _names(waiting)), time.time())
        yield info
        gauge = GaugeMetricFamily("loradeck_adapter_requests_running", "Requests in the batch.", labels=("adapter",))
        for label, count in Tally(map(self.labels.label, running)).items():
            gauge.add_metric((label,), count)
        yield gauge

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=("model_name",))
        gauge.add_metric((self._base,), value)
        return gauge

    def _counter(self, name: str, text: str, value: float) -> Metric:
        counter = CounterMetricFamily(name, text, labels=("model_name",))
        counter.add_metric((self._base,), value)
        return counter

    def _remove_series(self, label: str) -> None:
        for metric in (
            self._adapter_requests,
            self._adapter_prompt_tokens,
            self._adapter_generated_tokens,
            self._adapter_first_token,
        ):
            metric.remove_by_labels({"adapter": label})


class AdapterLabels:
    """Label values for adapters: only the busiest have their own, so clients cannot create any number of series.

    A newcomer replaces the least busy adapter only when it has had twice as many requests, so that series do not flap.
    """

    def __init__(self, maximum: int, on_removed: Callable[[str], None]) -> None:
        """`on_removed` is called with a label that is no longer used."""
        self._maximum = maximum
        self._on_removed = on_removed
        self._lock = threading.Lock()
        self._requests: Tally[str] = Tally()
        self._labelled: set[str] = set()

    def count(self, adapter: str, requests: int = 1) -> None:
        """Count requests for an adapter, named as in `Request.adapter`; with 0, it gets a label if one is free."""
        name = name_of(adapter)
        if name in (BASE_LABEL, BLEND_LABEL):
            return
        with self._lock:
            self._requests[name] += requests
            if name in self._labelled:
                return
            if len(self._labelled) >= self._maximum:
                least = min(self._labelled, key=self._requests.__getitem__)
                if self._requests[name] < max(1, 2 * self._requests[least]):
                    return
                self._labelled.discard(least)
                self._on_removed(least)
            self._labelled.add(name)

    def label(self, adapter: str) -> str:
        """Return the current label of an adapter."""
        name = name_of(adapter)
        return name if name in self._labelled or name in (BASE_LABEL, BLEND_LABEL) else OTHER_LABEL


def name_of(adapter: str) -> str:
    """Return the name in `poet@2*0.7`, or the label of a blend or of the base."""
    return BLEND_LABEL if "+" in adapter else adapter.partition("*")[0].partition("@")[0] or BASE_LABEL


def _names(adapters: Collection[str]) -> str:
    """Return the distinct names of adapters, those in blends too, as vLLM writes them into a label."""
    names = {name_of(part) for adapter in adapters if adapter for part in adapter.split("+")}
    return ",".join(sorted(names)[:MAX_LISTED])
