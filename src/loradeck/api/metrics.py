"""What Prometheus reads: vLLM's names, so that dashboards and routers made for it work, and each adapter's own.

Watches an engine through its `Observer`; what can be asked when it is read is asked then. Knows no HTTP.
"""

import time
from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loradeck.api.metric_labels import MetricLabels, name_of

if TYPE_CHECKING:
    from loradeck.serve.engine import Engine
    from loradeck.serve.request import Finish, Request

# vLLM's bounds, in seconds, so that its dashboards' quantiles are comparable.
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
WHOLE = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)
REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "failed": "error"}  # ours -> vLLM's
LISTED = 100  # names in a label's value


class Metrics(Collector):
    """One engine's numbers. Give it to the engine as its observer, and to the app."""

    def __init__(self, base: str, top_adapters: int = 100) -> None:
        """`base` is the value of vLLM's label model_name; so many adapters have series of their own at most."""
        self.registry = CollectorRegistry()
        self.labels = MetricLabels(top_adapters, self._forget)
        self._base = base
        self._engine: Engine | None = None
        self._live: Callable[[], Collection[Request]] = tuple
        own = {"labelnames": ("model_name",), "registry": self.registry}
        each = {"labelnames": ("adapter",), "registry": self.registry}
        self._prompt = Counter("vllm:prompt_tokens", "Prompt tokens of admitted requests.", **own)
        self._generated = Counter("vllm:generation_tokens", "Generated tokens.", **own)
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended, by how.",
            labelnames=("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._first = Histogram("vllm:time_to_first_token_seconds", "From arrival.", buckets=FIRST, **own)
        self._between = Histogram("vllm:inter_token_latency_seconds", "Between tokens.", buckets=BETWEEN, **own)
        self._whole = Histogram("vllm:e2e_request_latency_seconds", "From arrival to end.", buckets=WHOLE, **own)
        self._queued = Histogram("vllm:request_queue_time_seconds", "From arrival to admission.", buckets=WHOLE, **own)
        self._adapter_requests = Counter("loradeck_adapter_requests", "Requests that were admitted.", **each)
        self._adapter_prompt = Counter("loradeck_adapter_prompt_tokens", "Prompt tokens.", **each)
        self._adapter_generated = Counter("loradeck_adapter_generation_tokens", "Generated tokens.", **each)
        self._adapter_first = Histogram(
            "loradeck_adapter_time_to_first_token_seconds", "From arrival, loading included.", buckets=FIRST, **each
        )
        self.registry.register(self)

    def watch(self, engine: "Engine", live: Callable[[], "Collection[Request]"]) -> None:
        """Ask this engine too, and `live` for the requests that have not ended, whenever the numbers are read."""
        self._engine = engine
        self._live = live

    def read(self) -> bytes:
        """Return all numbers in Prometheus's text format."""
        return generate_latest(self.registry)

    # ---- as it happens, in the engine's thread

    def admitted(self, request: "Request") -> None:
        """Count a request and its prompt."""
        self.labels.count(request.adapter)
        label = self.labels.of(request.adapter)
        self._prompt.labels(self._base).inc(len(request.prompt))
        self._queued.labels(self._base).observe(request.admitted - request.arrived)
        self._adapter_requests.labels(label).inc()
        self._adapter_prompt.labels(label).inc(len(request.prompt))

    def token(self, request: "Request", since: float) -> None:
        """Count a token."""
        label = self.labels.of(request.adapter)
        self._generated.labels(self._base).inc()
        self._adapter_generated.labels(label).inc()
        if request.generated <= 1:
            self._first.labels(self._base).observe(since)
            self._adapter_first.labels(label).observe(since)
        else:
            self._between.labels(self._base).observe(since)

    def finished(self, request: "Request", finish: "Finish") -> None:
        """Count how a request ended."""
        self._success.labels(self._base, REASONS[finish]).inc()
        self._whole.labels(self._base).observe(time.monotonic() - request.arrived)

    # ---- as it is when it is read

    def describe(self) -> Iterator[Metric]:
        """Name nothing: what `collect` yields depends on an engine, which is not there yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield what the engine says of itself now."""
        if self._engine is None:
            return
        stats, residency = self._engine.stats, self._engine.residency
        yield self._gauge("vllm:num_requests_running", "Requests that have a row.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that have none yet.", stats.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "From 0 to 1.", stats.kv_bytes / stats.kv_budget)
        yield self._count("vllm:prefix_cache_queries", "Tokens looked for.", stats.prefix_queries)
        yield self._count("vllm:prefix_cache_hits", "Tokens found.", stats.prefix_hits)
        yield from self._requests(self._engine.config.max_rows)
        loaded = GaugeMetricFamily(
            "loradeck_adapter_loaded", "Versions that take memory.", labels=("adapter", "tier", "pinned")
        )
        residents = residency.residents()
        for own in residents:
            self.labels.count(own.spec, 0)
        kinds = Tally((self.labels.of(own.spec), own.tier, str(own.pinned).lower()) for own in residents)
        for kind, count in kinds.items():
            loaded.add_metric(kind, count)
        yield loaded
        yield GaugeMetricFamily("loradeck_adapter_resident_bytes", "On the device.", residency.nbytes)
        yield CounterMetricFamily("loradeck_adapter_loads", "Adapters loaded.", residency.loads)
        yield CounterMetricFamily("loradeck_adapter_load_seconds", "Spent on it.", residency.load_seconds)
        yield CounterMetricFamily("loradeck_adapter_evictions", "Adapters that gave way.", residency.evictions)

    def _requests(self, most: int) -> Iterator[Metric]:
        """Yield which adapters run, and wait; no more than `most` requests, and so adapters, run at once."""
        live = self._live()
        running = [request.adapter for request in live if request.admitted]
        waiting = [request.adapter for request in live if not request.admitted]
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Seconds since 1970; the labels are what it tells.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        info.add_metric((str(most), _listed(running), _listed(waiting)), time.time())
        yield info
        own = GaugeMetricFamily("loradeck_adapter_requests_running", "Requests that have a row.", labels=("adapter",))
        for label, count in Tally(map(self.labels.of, running)).items():
            own.add_metric((label,), count)
        yield own

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        made = GaugeMetricFamily(name, text, labels=("model_name",))
        made.add_metric((self._base,), value)
        return made

    def _count(self, name: str, text: str, value: float) -> Metric:
        made = CounterMetricFamily(name, text, labels=("model_name",))
        made.add_metric((self._base,), value)
        return made

    def _forget(self, label: str) -> None:
        for metric in (self._adapter_requests, self._adapter_prompt, self._adapter_generated, self._adapter_first):
            metric.remove_by_labels({"adapter": label})


def _listed(adapters: Collection[str]) -> str:
    """Return the adapters' names, each once, as vLLM writes them into a label; a blend's are several."""
    names = {name_of(part) for text in adapters if text for part in text.split("+")}
    return ",".join(sorted(names)[:LISTED])
