"""Counters, gauges and histograms of one server, and their two renderings.

The engine and the server say what happened in domain words (`prompt_done`, `step`, `finished`);
which instruments that touches, and under whose names they appear, is decided here and nowhere
else. `/metrics` shows vLLM's names, llama-server's names and a few of our own in the Prometheus
text format, or the seed's nine values as JSON. Sources: `vllm/v1/metrics/loggers.py` and
llama.cpp's `tools/server/README.md` for names, types, labels and bounds.

Must never: read a clock (times are passed in), build a dict or a string for a token, or let a
client choose how many label sets there are. One thread, the loop's, calls everything.

Invariants, tested: a value exposed under two names is stored once; `_bucket` never falls with
`le`, and its `+Inf` is `_count`; `vllm:e2e_request_latency_seconds_count` is the sum of
`vllm:request_success_total`; the same calls give the same bytes.
"""

import math
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Generic, TypeVar

from mlxlite.engine.sequence import Usage
from mlxlite.prefix_cache.operations import CacheStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"  # the label value for what is not known, or one too many
# Label sets of one family; the next ones share one more, all of whose labels are "other".
MAX_LABEL_SETS = 64
# Bounds in seconds, as in vLLM: a dashboard's quantiles mean the same on both servers.
TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LATENCY_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Ours: from the loop lag that nobody notices (0.2 ms) to the one that a health check does.
STEP_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64)
# A method is the client's to invent, so those that are not here are "other".
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
Labels = tuple[tuple[str, str], ...]


class Value:
    """One number: of a counter, which only grows, or of a gauge."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number: float = 0

    def add(self, amount: float = 1) -> None:
        self.number += amount

    def set(self, number: float) -> None:
        self.number = number


class Distribution:
    """The observations of a histogram: how many in each bucket, how many in all, and their sum."""

    __slots__ = ("bounds", "count", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # not cumulative; the last is above every bound
        self.count = 0
        self.sum: float = 0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1  # a bound belongs to its own bucket
        self.count += 1
        self.sum += value

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else 0.0


S = TypeVar("S", Value, Distribution)


class _Family(ABC, Generic[S]):
    """One name with its help, its type and a series for each label set."""

    kind: str

    def __init__(
        self,
        name: str,
        help_text: str,
        label_names: tuple[str, ...] = (),
        *,
        fixed: Labels = (),
        max_label_sets: int = MAX_LABEL_SETS,
    ) -> None:
        names = [label for label, _ in fixed] + list(label_names)
        assert _METRIC_NAME.fullmatch(name), name
        assert all(_LABEL_NAME.fullmatch(label) and label != "le" for label in names), names
        assert len(set(names)) == len(names), names
        self.name = name
        self.help_text = help_text
        self.label_names = label_names
        self.fixed = fixed
        self.max_label_sets = max_label_sets
        self._series: dict[tuple[str, ...], S] = {}

    def labels(self, *values: str) -> S:
        """The series of these label values, in the order of `label_names`; made when new."""
        series = self._series.get(values)
        if series is not None:
            return series
        assert len(values) == len(self.label_names), (self.name, values)
        if len(self._series) >= self.max_label_sets:
            values = (OTHER,) * len(values)
        return self._series.setdefault(values, self._new())

    def share(self, of: "_Family[S]") -> None:
        """Show the series of another family under this one's name, help and fixed labels."""
        assert self.kind == of.kind, self.name
        assert not self._series, self.name
        assert self.label_names == of.label_names, self.name
        self._series = of._series

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {_escape_help(self.help_text)}"
        yield f"# TYPE {self.name} {self.kind}"
        for values, series in sorted(self._series.items(), key=lambda item: item[0]):
            own: Labels = tuple(zip(self.label_names, values, strict=True))
            yield from self._samples(self.fixed + own, series)

    @abstractmethod
    def _new(self) -> S: ...

    @abstractmethod
    def _samples(self, labels: Labels, series: S) -> Iterator[str]: ...


class _Number(_Family[Value]):
    def _new(self) -> Value:
        return Value()

    def _samples(self, labels: Labels, series: Value) -> Iterator[str]:
        yield _sample(self.name, labels, series.number)


class Counter(_Number):
    """A family of numbers that only grow. By convention its name ends in `_total`."""

    kind = "counter"


class Gauge(_Number):
    """A family of numbers that rise and fall."""

    kind = "gauge"


class Histogram(_Family[Distribution]):
    """A family of distributions over the same bounds, which rise; `+Inf` is added."""

    kind = "histogram"

    def __init__(
        self,
        name: str,
        help_text: str,
        bounds: tuple[float, ...],
        label_names: tuple[str, ...] = (),
        *,
        fixed: Labels = (),
        max_label_sets: int = MAX_LABEL_SETS,
    ) -> None:
        super().__init__(name, help_text, label_names, fixed=fixed, max_label_sets=max_label_sets)
        assert bounds, name
        assert all(low < high for low, high in pairwise((*bounds, math.inf))), bounds
        self.bounds = bounds

    def _new(self) -> Distribution:
        return Distribution(self.bounds)

    def _samples(self, labels: Labels, series: Distribution) -> Iterator[str]:
        num = 0
        for bound, count in zip((*self.bounds, math.inf), series.counts, strict=True):
            num += count
            # "1.0" and not "1", as the Python client and with it vLLM write it.
            le = _number(float(bound))
            yield _sample(f"{self.name}_bucket", (*labels, ("le", le)), num)
        yield _sample(f"{self.name}_sum", labels, series.sum)
        yield _sample(f"{self.name}_count", labels, num)


Family = Counter | Gauge | Histogram
F = TypeVar("F", Counter, Gauge, Histogram)


class Registry:
    """The families, in the order in which they are shown."""

    def __init__(self) -> None:
        self._families: list[Family] = []

    def add(self, family: F) -> F:
        """Refuses a name that is taken, also by a histogram's `_bucket`, `_sum` or `_count`."""
        taken = {name for known in self._families for name in _sample_names(known)}
        assert taken.isdisjoint(_sample_names(family)), family.name
        self._families.append(family)
        return family

    def render(self) -> bytes:
        """The Prometheus text format, version 0.0.4, in UTF-8."""
        lines = [line for family in self._families for line in family.lines()]
        # A model's path may hold bytes that are no UTF-8 (surrogate escapes): shown as "?".
        return "".join(f"{line}\n" for line in lines).encode("utf-8", errors="replace")


class Metrics:
    """All the instruments of one server.

    `routes` are the handler labels that may appear. `start_time_s` is Unix time.
    `max_context_tokens` bounds the buckets of the prompt and output histograms.
    """

    def __init__(
        self,
        *,
        model_name: str,
        version: str,
        start_time_s: float,
        routes: Collection[str] = (),
        max_context_tokens: int = 131072,
    ) -> None:
        self._registry = Registry()
        self._fixed: Labels = (("model_name", model_name), ("engine", "0"))
        self._routes = frozenset(routes)
        self._add_gauges()
        self._add_counters()
        self._add_histograms(max_context_tokens)
        self._add_ours()
        started = Gauge(
            "mlxlite:process_start_time_seconds", "When the server started, in Unix time."
        )
        self._registry.add(started).labels().set(start_time_s)
        constant = Gauge("mlxlite:info", "Always 1; the label says it.", ("version",))
        self._registry.add(constant).labels(version).set(1)

    # --- the instruments: each vLLM value, and beside it llama-server's name for the same -------

    def _add_gauges(self) -> None:
        add, fixed = self._registry.add, self._fixed
        running = add(Gauge("vllm:num_requests_running", "In prefill or decode.", fixed=fixed))
        waiting = add(Gauge("vllm:num_requests_waiting", "In the queue.", fixed=fixed))
        usage = add(
            Gauge("vllm:kv_cache_usage_perc", "Of the memory for sequences, 0 to 1.", fixed=fixed)
        )
        self.kv_usage = usage.labels()
        add(Gauge("llamacpp:requests_processing", "In prefill or decode.")).share(running)
        add(Gauge("llamacpp:requests_deferred", "In the queue.")).share(waiting)
        self.num_running, self.num_waiting = running.labels(), waiting.labels()

    def _add_counters(self) -> None:
        add, fixed = self._registry.add, self._fixed
        prompt = add(
            Counter("vllm:prompt_tokens_total", "Prompt tokens, cached or not.", fixed=fixed)
        )
        cached = add(
            Counter("vllm:prompt_tokens_cached_total", "Prompt tokens not computed.", fixed=fixed)
        )
        output = add(Counter("vllm:generation_tokens_total", "Output tokens.", fixed=fixed))
        finished = add(
            Counter(
                "vllm:request_success_total", "Ended sequences.", ("finished_reason",), fixed=fixed
            )
        )
        asked = add(Counter("vllm:prefix_cache_queries_total", "Tokens looked for.", fixed=fixed))
        hits = add(Counter("vllm:prefix_cache_hits_total", "Tokens found.", fixed=fixed))
        self.num_asked, self.num_hits = asked.labels(), hits.labels()
        preempted = add(
            Counter("vllm:num_preemptions_total", "Sequences that gave way.", fixed=fixed)
        )
        self.num_preempted = preempted.labels()
        # llama-server's does not count the cached ones, vLLM's does: two values.
        computed = add(Counter("llamacpp:prompt_tokens_total", "Prompt tokens computed."))
        add(Counter("llamacpp:tokens_predicted_total", "Output tokens.")).share(output)
        add(Counter("llamacpp:prompt_tokens_cached_total", "Prompt tokens not computed.")).share(
            cached
        )
        prompt_s = add(Counter("llamacpp:prompt_seconds_total", "Spent on prompts."))
        output_s = add(Counter("llamacpp:tokens_predicted_seconds_total", "Spent on outputs."))
        self.prompt_s, self.output_s = prompt_s.labels(), output_s.labels()
        decodes = add(Counter("llamacpp:n_decode_total", "Steps that ran the model."))
        self.prompt_tokens, self.cached_tokens = prompt.labels(), cached.labels()
        self.output_tokens, self.computed_tokens = output.labels(), computed.labels()
        self.num_decodes = decodes.labels()
        self.num_finished = {
            reason: finished.labels(reason) for reason in ("stop", "length", "abort", "error")
        }
        self.num_finished["cancelled"] = self.num_finished["abort"]  # our word, vLLM's word

    def _add_histograms(self, max_context_tokens: int) -> None:
        token_bounds = bounds_1_2_5(max_context_tokens)

        def add(name: str, help_text: str, bounds: tuple[float, ...]) -> Distribution:
            family = Histogram(f"vllm:{name}", help_text, bounds, fixed=self._fixed)
            return self._registry.add(family).labels()

        self.ttft_s = add("time_to_first_token_seconds", "Arrival to first token.", TTFT_S)
        self.itl_s = add("inter_token_latency_seconds", "One token to the next.", ITL_S)
        self.e2e_s = add("e2e_request_latency_seconds", "Arrival to end.", LATENCY_S)
        self.queue_s = add("request_queue_time_seconds", "Arrival to start.", LATENCY_S)
        self.prefill_s = add("request_prefill_time_seconds", "Start to first token.", LATENCY_S)
        self.decode_s = add("request_decode_time_seconds", "First token to last.", LATENCY_S)
        self.inference_s = add("request_inference_time_seconds", "Start to end.", LATENCY_S)
        self.tpot_s = add("request_time_per_output_token_seconds", "Mean of a sequence.", ITL_S)
        self.max_output = add("request_params_max_tokens", "What was asked for.", token_bounds)
        self.num_prompt = add("request_prompt_tokens", "Of an ended sequence.", token_bounds)
        self.num_output = add("request_generation_tokens", "Of an ended sequence.", token_bounds)
        self.step_tokens = add("iteration_tokens_total", "Tokens in a step.", ITERATION_TOKENS)

    def _add_ours(self) -> None:
        add = self._registry.add
        phases = add(Histogram("mlxlite:step_seconds", "Parts of a tick.", STEP_S, ("phase",)))
        rows = add(Histogram("mlxlite:batch_rows", "Rows of a step that decodes.", BATCH_ROWS))
        lag = add(Histogram("mlxlite:loop_lag_seconds", "How late the loop woke up.", STEP_S))
        connections = add(Gauge("mlxlite:connections", "Open HTTP connections."))
        held = Gauge("mlxlite:prefix_cache_bytes", "Held by the prefix cache.", ("where",))
        held_bytes = add(held)
        self.held_bytes = {where: held_bytes.labels(where) for where in ("memory", "disk")}
        evicted = add(Counter("mlxlite:prefix_cache_evictions_total", "Prefixes that gave way."))
        loaded = add(Counter("mlxlite:prefix_cache_disk_loads_total", "Prefixes read from disk."))
        self.num_evicted, self.num_loaded = evicted.labels(), loaded.labels()
        ignored = add(Counter("mlxlite:ignored_fields_total", "Unknown fields in requests."))
        # vLLM has this one from its web framework, and so without a prefix.
        self.http_requests = add(
            Counter(
                "http_requests_total",
                "HTTP requests answered.",
                ("handler", "method", "status"),
                max_label_sets=(len(self._routes) + 1) * (len(METHODS) + 1) * 5,
            )
        )
        self.schedule_s, self.lane_s = phases.labels("schedule"), phases.labels("lane")
        self.deliver_s = phases.labels("deliver")
        self.build_s, self.dispatch_s = phases.labels("build"), phases.labels("dispatch")
        self.wait_s = phases.labels("wait")
        self.batch_rows, self.lag_s = rows.labels(), lag.labels()
        self.connections, self.num_ignored_fields = connections.labels(), ignored.labels()

    # --- what happened ------------------------------------------------------------------------

    def queued(self, n: int) -> None:
        """`n` sequences are in the queue now."""
        self.num_waiting.number = n

    def running(self, n: int) -> None:
        """`n` sequences are in prefill or decode now."""
        self.num_running.number = n

    def prompt_done(self, num_tokens: int, queue_s: float, num_cached: int = 0) -> None:
        """A prompt of `num_tokens` is prefilled, `num_cached` of them from the cache."""
        assert 0 <= num_cached <= num_tokens
        self.prompt_tokens.number += num_tokens
        self.cached_tokens.number += num_cached
        self.computed_tokens.number += num_tokens - num_cached
        self.queue_s.observe(queue_s)

    def first_token(self, seconds: float) -> None:
        self.ttft_s.observe(seconds)

    def tokens(self, num: int) -> None:
        """`num` more output tokens, of whatever sequences; first ones included."""
        self.output_tokens.number += num

    def token_gap(self, seconds: float) -> None:
        self.itl_s.observe(seconds)

    def step(
        self,
        num_rows: int,
        num_prefill_tokens: int,
        schedule_s: float,
        lane_s: float,
        deliver_s: float,
    ) -> None:
        """One tick. A step that only releases or admits is timed, but is no batch."""
        self.schedule_s.observe(schedule_s)
        self.lane_s.observe(lane_s)
        self.deliver_s.observe(deliver_s)
        if num_rows + num_prefill_tokens:
            self.num_decodes.number += 1
            self.step_tokens.observe(num_rows + num_prefill_tokens)
        if num_rows:
            self.batch_rows.observe(num_rows)

    def lane(self, build_s: float, dispatch_s: float, wait_s: float) -> None:
        """What the lane spent on one step: its graph, handing it to the device, its tokens."""
        self.build_s.observe(build_s)
        self.dispatch_s.observe(dispatch_s)
        self.wait_s.observe(wait_s)

    def finished(self, reason: str, e2e_s: float, num_prompt: int, num_output: int) -> None:
        """A sequence ended: stop, length, error, or cancelled (shown as vLLM's abort)."""
        self.num_finished[reason].number += 1
        self.e2e_s.observe(e2e_s)
        self.num_prompt.observe(num_prompt)
        self.num_output.observe(num_output)

    def times(self, usage: Usage, max_tokens: int) -> None:
        """Where the time of an ended sequence went, and how long it might have been."""
        self.prompt_s.number += usage.prefill_s
        self.output_s.number += usage.decode_s
        self.prefill_s.observe(usage.prefill_s)
        self.decode_s.observe(usage.decode_s)
        self.inference_s.observe(usage.prefill_s + usage.decode_s)
        if usage.num_output > 1:
            self.tpot_s.observe(usage.decode_s / (usage.num_output - 1))
        self.max_output.observe(max_tokens)

    def preempted(self) -> None:
        """A sequence that had given way begins again."""
        self.num_preempted.number += 1

    def memory(self, num_bytes: int, max_bytes: int | None) -> None:
        """What sequences hold now, of what there is for them."""
        self.kv_usage.number = num_bytes / max_bytes if max_bytes else 0.0

    def prefix_cache(self, stats: CacheStats) -> None:
        """The prefix cache as it is now: it counts for itself."""
        self.num_asked.number, self.num_hits.number = stats.num_asked, stats.num_hit
        self.num_evicted.number, self.num_loaded.number = stats.num_evicted, stats.num_from_disk
        self.held_bytes["memory"].number = stats.num_bytes
        self.held_bytes["disk"].number = stats.disk_bytes

    def loop_lag(self, seconds: float) -> None:
        self.lag_s.observe(seconds)

    def http(self, handler: str, method: str, status: int) -> None:
        """An HTTP request was answered; `handler` is the route that matched, not the path."""
        assert 100 <= status <= 599, status
        self.http_requests.labels(
            handler if handler in self._routes else OTHER,
            method if method in METHODS else OTHER,
            f"{status // 100}xx",
        ).add()

    def connection_opened(self) -> None:
        self.connections.number += 1

    def connection_closed(self) -> None:
        self.connections.number -= 1

    def ignored_fields(self, num: int) -> None:
        """A request had `num` fields that no one knows."""
        self.num_ignored_fields.number += num

    # --- renderings ---------------------------------------------------------------------------

    def render_prometheus(self) -> bytes:
        return self._registry.render()

    def seed_json(self, max_batch_size: int) -> dict[str, float | int]:
        """The seed's nine values. A batch is a step that decodes; latency is end to end."""
        prompt, cached = self.prompt_tokens.number, self.cached_tokens.number
        return {
            "waiting_requests": int(self.num_waiting.number),
            "running_requests": int(self.num_running.number),
            "max_batch_size": max_batch_size,
            "total_requests_processed": self.e2e_s.count,
            "total_batches_processed": self.batch_rows.count,
            "avg_batch_size": self.batch_rows.mean,
            "avg_latency_ms": self.e2e_s.mean * 1000,
            "cache_hit_rate": cached / prompt if prompt else 0.0,
            "total_tokens_generated": int(self.output_tokens.number),
        }


def bounds_1_2_5(max_value: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, … up to `max_value`, as in vLLM."""
    assert max_value >= 1
    digits = range(len(str(max_value)))
    series = (mantissa * 10**digit for digit in digits for mantissa in (1, 2, 5))
    return tuple(bound for bound in series if bound <= max_value)


def _sample_names(family: Family) -> set[str]:
    if isinstance(family, Histogram):
        return {family.name} | {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
    return {family.name}


def _sample(name: str, labels: Labels, value: float) -> str:
    if not labels:
        return f"{name} {_number(value)}"
    pairs = ",".join(f'{label}="{_escape_label(text)}"' for label, text in labels)
    return f"{name}{{{pairs}}} {_number(value)}"


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(value)


def _escape_label(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _escape_help(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")
