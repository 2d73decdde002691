"""Prometheus metrics, under vLLM's names behind our prefix."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from smolrun.api import Result
    from smolrun.server.service import Service

PREFIX = "smolrun:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Metrics:
    """Everything that `/metrics` tells."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self._service = service

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(PREFIX + name, text, registry=self.registry, buckets=buckets)

        self.requests = counter("http_requests", "Replies by status", ("status",))
        self.success = counter("request_success", "Answers that ended well", ("finished_reason",))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.generation_tokens = counter("generation_tokens", "Tokens generated")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From the engine's queue to the first token"
        )
        self.per_token = histogram(
            "time_per_output_token_seconds", "Mean time of a token after the first, per answer"
        )
        self.latency = histogram("e2e_request_latency_seconds", "From the queue to the last token")
        self.queue = histogram("request_queue_time_seconds", "Waiting to be let in")
        self.prefill = histogram("request_prefill_time_seconds", "Reading the prompt")
        self.decode = histogram("request_decode_time_seconds", "Generating")
        self.choices = histogram("request_params_n", "Answers asked for at once", (1, 2, 4, 8))
        self.max_tokens = histogram("request_params_max_tokens", "max_tokens", _TOKENS)
        self.step_tokens = histogram("iteration_tokens_total", "Tokens of a step", _TOKENS)
        self.registry.register(self)

    def ended(self, result: Result, counts_prompt: bool) -> None:
        """Count an answer, and its prompt unless another answer to it did."""
        times, usage = result.timings, result.usage
        if counts_prompt:
            self.prompt_tokens.inc(usage.prompt_tokens)
        self.generation_tokens.inc(usage.completion_tokens)
        if result.finish_reason == "cancelled":
            return
        self.success.labels(result.finish_reason).inc()
        self.queue.observe(times.queue_ms / 1000)
        self.prefill.observe(times.prompt_ms / 1000)
        self.decode.observe(times.predicted_ms / 1000)
        self.first_token.observe((times.queue_ms + times.prompt_ms) / 1000)
        self.latency.observe((times.queue_ms + times.prompt_ms + times.predicted_ms) / 1000)
        if times.predicted_n > 1:
            self.per_token.observe(times.predicted_ms / 1000 / (times.predicted_n - 1))

    def collect(self) -> Iterator[Metric]:
        """What the engine counts, read when asked for."""
        found = self._service.statistics()
        gauges = {
            "num_requests_running": ("Answers that run", found.get("running", 0)),
            "num_requests_waiting": ("Answers that wait", found.get("waiting", 0)),
            "kv_cache_usage_perc": (
                "KV blocks held, 0 to 1",
                found.get("kv_blocks_held", 0) / max(found.get("kv_blocks", 1), 1),
            ),
            "places_taken": (
                "Requests under way",
                found.get("places_taken", 0),
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked for", found.get("prompt_tokens", 0)),
            "prefix_cache_hits": ("Prompt tokens found", found.get("cached_tokens", 0)),
            "num_preemptions": ("Always 0: admission is by blocks", 0),
            "requests_cancelled": ("Answers nobody waits for", found.get("cancelled", 0)),
            "requests_rejected": (
                "Requests turned away",
                found.get("rejected", 0),
            ),
            "requests_expired": ("Answers that took too long", found.get("expired", 0)),
            "requests_failed": ("Answers that ended in an error", found.get("failed", 0)),
            "corrupted_requests": ("Answers with a NaN", found.get("corrupted", 0)),
            "engine_steps": ("Steps of the engine", found.get("steps", 0)),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(PREFIX + name, text, value=value)
        yield GaugeMetricFamily(
            "process_resident_memory_bytes", "Resident memory", value=_resident()
        )

    def page(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(_Lasting(self.registry))


class _Lasting(Collector):
    """A registry without the times at which its counters were made, a third of the page."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


def _resident() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))
