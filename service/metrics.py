"""Counters and histograms of the server, and their exposition through prometheus_client under names that vLLM's dashboards know.

What the engine counts is read from it when someone looks; what only time tells is observed per delivery. No HTTP here. Fed by the
engine client's deliveries and by the API; shown by `/metrics`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:  # values only pass through here
    from service.engine.messages import Delivery, Event, LaneStats, ModelInfo, Usage

ENGINE = "0"
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_CHOICES = (1, 2, 5, 10, 20)
_PICTURE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PICTURE_WORK = ("encode", "draw")

# name, what it is, whether it only grows, and its value.
_LANE: tuple[tuple[str, str, bool, Callable[[LaneStats], float]], ...] = (
    ("num_requests_running", "Sequences that are being computed.", False, lambda lane: lane.running),
    ("num_requests_waiting", "Sequences that wait for their turn.", False, lambda lane: lane.waiting),
    ("kv_cache_usage_perc", "Share of K/V blocks in use, 0 to 1.", False, lambda lane: lane.kv_blocks_used / max(lane.kv_blocks_total, 1)),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", True, lambda lane: lane.prefix_queries),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", True, lambda lane: lane.prefix_hits),
    ("num_preemptions", "Sequences that lost their blocks and were computed again.", True, lambda lane: lane.preemptions),
    ("prompt_tokens", "Prompt tokens taken in.", True, lambda lane: lane.prompt_tokens),
    ("generation_tokens", "Tokens drawn.", True, lambda lane: lane.generation_tokens),
    ("engine_steps", "Steps finished.", True, lambda lane: lane.steps),
    ("graph_replays", "Steps of one token a sequence that ran as a recorded graph.", True, lambda lane: lane.graph_replays),
    ("graph_misses", "Steps of one token a sequence that had to do without a recorded graph.", True, lambda lane: lane.graph_misses),
    ("kernel_compiles", "GPU kernels that a step had to compile or fetch, after warm-up.", True, lambda lane: lane.kernel_compiles),
)
# name and what it is, by kind of drafter; of each the place in `LaneStats.drafts`.
_DRAFTS = (
    ("spec_decode_num_draft_tokens", "Ids guessed ahead of what was drawn."),
    ("spec_decode_num_accepted_tokens", "Ids guessed ahead that were drawn then."),
)
DRAFTERS = ("lookup", "model", "jacobi")


class EngineNumbers(Collector):
    """Turns what the engine last said into samples, at the moment of asking."""

    def __init__(
        self,
        prefix: str,
        stats: Callable[[], Mapping[str, LaneStats]],
        models: Callable[[], Mapping[str, ModelInfo]],
        has_prefix_cache: bool,
    ) -> None:
        self._prefix = prefix
        self._stats = stats
        self._models = models
        self._has_prefix_cache = has_prefix_cache

    def collect(self) -> Iterator[Metric]:
        models = self._models()
        stats = self._stats()
        for name, text, is_counter, value in _LANE:
            kind = CounterMetricFamily if is_counter else GaugeMetricFamily
            family = kind(f"{self._prefix}:{name}", text, labels=("model_name", "engine"))
            for model in models:
                # A lane reports after its first step; until then its numbers are zero, not absent.
                family.add_metric((model, ENGINE), value(stats[model]) if model in stats else 0.0)
            yield family
        for place, (name, text) in enumerate(_DRAFTS):
            family = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=("model_name", "engine", "drafter"))
            for model in models:
                drafts = stats[model].drafts if model in stats else {}
                for drafter in DRAFTERS:
                    family.add_metric((model, ENGINE, drafter), drafts.get(drafter, (0, 0))[place])
            yield family
        labels = ("model_name", "engine", "block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching", "max_model_len")
        info = GaugeMetricFamily(f"{self._prefix}:cache_config_info", "How the K/V cache is laid out.", labels=labels)
        for known in models.values():
            numbers = (str(known.block_size), str(known.num_kv_blocks), known.dtype, str(self._has_prefix_cache), str(known.max_context))
            info.add_metric((known.name, ENGINE, *numbers), 1)
        yield info


@dataclass(slots=True)
class _Running:
    """A request that is under way. last: when each choice's newest tokens came."""

    model: _ModelMetrics
    arrival: float
    num_open: int
    last: dict[int, float] = field(default_factory=dict)


class _ModelMetrics:
    """One model's series, looked up once."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        labels = (model, ENGINE)
        self.labels = labels
        self.first_token_s = metrics.first_token_s.labels(*labels)
        self.inter_token_s = metrics.inter_token_s.labels(*labels)
        self.per_token_s = metrics.per_token_s.labels(*labels)
        self.e2e_s = metrics.e2e_s.labels(*labels)
        self.queue_s = metrics.queue_s.labels(*labels)
        self.prefill_s = metrics.prefill_s.labels(*labels)
        self.decode_s = metrics.decode_s.labels(*labels)
        self.inference_s = metrics.inference_s.labels(*labels)
        self.prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self.generation_tokens = metrics.generation_tokens.labels(*labels)
        self.preemptions = metrics.preemptions.labels(*labels)
        self.max_tokens = metrics.max_tokens.labels(*labels)
        self.num_choices = metrics.num_choices.labels(*labels)
        self.step_tokens = metrics.step_tokens.labels(*labels)
        self.finished = {reason: metrics.finished.labels(*labels, reason) for reason in ("stop", "length", "abort", "error", "deadline")}


class Metrics:
    """All series of one server, in a registry of their own. prefix: "braid" or "vllm". models: names, so that series exist from the
    start."""

    def __init__(self, prefix: str, models: Iterable[str]) -> None:
        self.registry = CollectorRegistry()
        self.prefix = prefix
        labels = ("model_name", "engine")

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{prefix}:{name}", text, labels, buckets=buckets, registry=self.registry)

        self.first_token_s = histogram("time_to_first_token_seconds", "From arrival to the first tokens.", _FIRST_TOKEN_S)
        self.inter_token_s = histogram("inter_token_latency_seconds", "Between two tokens of a choice.", _TOKEN_S)
        self.per_token_s = histogram("request_time_per_output_token_seconds", "Mean time per token after the first, per choice.", _TOKEN_S)
        self.e2e_s = histogram("e2e_request_latency_seconds", "From arrival to the last token of a choice.", _REQUEST_S)
        self.queue_s = histogram("request_queue_time_seconds", "Waiting before the first slice.", _REQUEST_S)
        self.prefill_s = histogram("request_prefill_time_seconds", "First slice to first token.", _REQUEST_S)
        self.decode_s = histogram("request_decode_time_seconds", "First token to last.", _REQUEST_S)
        self.inference_s = histogram("request_inference_time_seconds", "First slice to last token.", _REQUEST_S)
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a choice.", _TOKENS)
        self.generation_tokens = histogram("request_generation_tokens", "Tokens drawn for a choice.", _TOKENS)
        self.max_tokens = histogram("request_params_max_tokens", "The max_tokens that was asked for, or left by the context.", _TOKENS)
        self.num_choices = histogram("request_params_n", "The n that was asked for.", _CHOICES)
        self.preemptions = histogram("request_num_preemptions", "Preemptions of a choice.", (0, *_CHOICES))
        self.step_tokens = histogram("iteration_tokens_total", "Tokens computed in a step.", _STEP_TOKENS)
        self.finished = Counter(
            f"{prefix}:request_success", "Choices that ended, by how.", (*labels, "finished_reason"), registry=self.registry
        )
        self.rejected = Counter(
            f"{prefix}:admission_rejections", "Requests refused because of load.", ("model_name", "reason"), registry=self.registry
        )
        self.http = Counter(f"{prefix}:http_requests", "HTTP answers.", ("method", "route", "status"), registry=self.registry)
        self.is_ready = Gauge(f"{prefix}:engine_ready", "1 while the engine takes requests.", registry=self.registry)
        self.picture_work_s = Histogram(
            f"{prefix}:picture_work_seconds",
            "From the wish to turn pixels into codes, or codes into pixels, to the result.",
            (*labels, "work"),
            buckets=_PICTURE_S,
            registry=self.registry,
        )
        self.picture_s = histogram("picture_seconds", "From arrival to a picture that was asked for.", _PICTURE_S)
        self.preview_s = histogram("time_to_first_preview_seconds", "From arrival to the first preview of a picture.", _PICTURE_S)
        self.picture_failures = Counter(
            f"{prefix}:picture_failures", "Pixels or codes that were not turned into the other.", labels, registry=self.registry
        )
        self._pictures: dict[str, tuple[str, str, float]] = {}
        self._models = {name: _ModelMetrics(self, name) for name in models}
        self._running: dict[str, _Running] = {}

    def watch_engine(
        self, *, stats: Callable[[], Mapping[str, LaneStats]], models: Callable[[], Mapping[str, ModelInfo]], is_ready: Callable[[], bool],
        has_prefix_cache: bool,
    ) -> None:  # fmt: skip
        """Reads the engine's own numbers from now on. Mutates: the registry."""
        self.registry.register(EngineNumbers(self.prefix, stats, models, has_prefix_cache))
        self.is_ready.set_function(lambda: float(is_ready()))

    def count_http(self, method: str, route: str | None, status: int) -> None:
        """route: its template, never the path that was asked for, so that the series stay few."""
        self.http.labels(method if method in _METHODS else "other", route or "unmatched", str(status)).inc()

    def reject(self, model: str, reason: str) -> None:
        self.rejected.labels(model, reason).inc()

    def begin(self, request_id: str, model: str, *, arrival: float, num_choices: int, max_tokens: int) -> None:
        """A request was admitted. arrival: of the HTTP request, in time.monotonic's seconds."""
        series = self._models[model]
        series.max_tokens.observe(max_tokens)
        series.num_choices.observe(num_choices)
        self._running[request_id] = _Running(series, arrival, num_choices)

    def begin_picture(self, request_id: str, model: str, work: str) -> None:
        """work: one of PICTURE_WORK."""
        self._pictures[request_id] = (model, work, time.monotonic())

    def drawn(self, model: str, arrival: float) -> None:
        """A picture that was asked for is done."""
        self.picture_s.labels(model, ENGINE).observe(time.monotonic() - arrival)

    def previewed(self, model: str, arrival: float) -> None:
        """The first preview of a picture is done."""
        self.preview_s.labels(model, ENGINE).observe(time.monotonic() - arrival)

    def on_delivery(self, delivery: Delivery) -> None:
        """For the engine client's list of listeners."""
        now = time.monotonic()
        if delivery.step_tokens:
            series = self._models.get(delivery.step_model)
            if series is not None:
                series.step_tokens.observe(delivery.step_tokens)
        for event in delivery.events:
            running = self._running.get(event.request_id)
            if running is not None:
                self._on_event(event, running, now)
            elif event.finish is not None and (picture := self._pictures.pop(event.request_id, None)) is not None:
                self._on_picture(event, *picture, now)

    def _on_picture(self, event: Event, model: str, work: str, began: float, now: float) -> None:
        if event.finish == "stop":
            self.picture_work_s.labels(model, ENGINE, work).observe(now - began)
        else:
            self.picture_failures.labels(model, ENGINE).inc()

    def _on_event(self, event: Event, running: _Running, now: float) -> None:
        series = running.model
        if event.tokens:
            last = running.last.get(event.choice)
            if last is None:
                series.first_token_s.observe(now - running.arrival)
            else:
                series.inter_token_s.observe((now - last) / len(event.tokens))
            running.last[event.choice] = now
        if event.finish is not None:
            series.finished[event.finish].inc()
            series.e2e_s.observe(now - running.arrival)
            if event.usage is not None:
                _observe_usage(series, event.usage)
            running.num_open -= 1
            if not running.num_open:
                del self._running[event.request_id]


def _observe_usage(series: _ModelMetrics, usage: Usage) -> None:
    series.queue_s.observe(usage.queue_s)
    series.prefill_s.observe(usage.prefill_s)
    series.decode_s.observe(usage.decode_s)
    series.inference_s.observe(usage.prefill_s + usage.decode_s)
    series.prompt_tokens.observe(usage.prompt_tokens)
    series.generation_tokens.observe(usage.completion_tokens)
    series.preemptions.observe(usage.preemptions)
    if usage.completion_tokens > 1:
        series.per_token_s.observe(usage.decode_s / (usage.completion_tokens - 1))
