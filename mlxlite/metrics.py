"""Counters, gauges and histograms of one server, as Prometheus text and as JSON.

The engine and the server report events (`prompt_done`, `step`, `finished`). This module decides
which instruments an event changes and under which names they appear: vLLM's, llama-server's and a
few of our own. Names, types, labels and bounds are those of `vllm/v1/metrics/loggers.py` and of
llama.cpp's `tools/server/README.md`.

Must never: read a clock (times are arguments), build a dict or a string for each token, or let a
client decide the number of label sets. All calls are made on the event loop's thread.

Invariants, tested: a value with two names is stored once; `_bucket` never falls with `le`, and its
`+Inf` is `_count`; `vllm:e2e_request_latency_seconds_count` is the sum of
`vllm:request_success_total`; the same calls give the same bytes.
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator
from functools import partial
from itertools import accumulate, pairwise
from typing import Literal

from mlxlite.engine.sequence import Usage
from mlxlite.prefix_cache.operations import CacheStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"  # the label value of every unknown route or method

# Bounds in seconds, as in vLLM: a dashboard's quantiles mean the same on both servers.
TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
E2E_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

# Our own: from a loop lag without effect (0.2 ms) to one that fails a health check.
STEP_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
CUT_REASONS = ("stalled", "slow", "backlog", "memory", "shutdown")
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64)

# Clients can send any method; one that is not listed is counted as "other".
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_NOT_FINITE = {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}

Kind = Literal["counter", "gauge", "histogram"]
Bounds = tuple[float, ...]
Labels = tuple[tuple[str, str], ...]


class Instrument:
    """A counter, a gauge or a histogram; with label names, one for each set of their values.

    The page shows it under one name or several. A histogram has finite `bounds`, which rise.
    """

    def __init__(self, kind: Kind, help_text: str, bounds: Bounds = (), *label_names: str) -> None:
        assert bool(bounds) == (kind == "histogram"), help_text
        assert all(low < high for low, high in pairwise((*bounds, math.inf))), bounds
        self.kind: Kind = kind
        self.help_text = help_text
        self.label_names = label_names
        self.bounds = bounds
        self.number: float = 0  # of a histogram: the sum of its observations
        self.count = 0
        self.counts = [0] * (len(bounds) + 1)  # not cumulative; the last is above every bound
        self._children: dict[tuple[str, ...], Instrument] = {} if label_names else {(): self}

    def labels(self, *values: str) -> "Instrument":
        """The one with these label values, in the order of `label_names`; made when new."""
        child = self._children.get(values)
        if child is None:
            assert len(values) == len(self.label_names), (self.label_names, values)
            child = self._children[values] = Instrument(self.kind, "", self.bounds)
        return child

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1  # a bound belongs to its own bucket
        self.count += 1
        self.number += value

    @property
    def mean(self) -> float:
        return self.number / self.count if self.count else 0.0

    def lines(self, name: str, fixed: Labels = ()) -> Iterator[str]:
        """The text under this name; `fixed` labels come before its own."""
        yield f"# HELP {name} {_escaped(self.help_text)}"
        yield f"# TYPE {name} {self.kind}"
        for values, child in sorted(self._children.items(), key=lambda item: item[0]):
            pairs = (*fixed, *zip(self.label_names, values, strict=True))
            yield from child._samples(name, [_label(*pair) for pair in pairs])

    def _samples(self, name: str, labels: list[str]) -> Iterator[str]:
        if not self.bounds:
            yield _sample(name, labels, self.number)
            return
        for bound, num in zip((*self.bounds, math.inf), accumulate(self.counts), strict=True):
            # "1.0" and not "1", as the Python client and with it vLLM write it.
            yield _sample(f"{name}_bucket", [*labels, f'le="{_text(float(bound))}"'], num)
        yield _sample(f"{name}_sum", labels, self.number)
        yield _sample(f"{name}_count", labels, self.count)


class Metrics:
    """All instruments of one server, and the events that change them; times are in seconds.

    `routes` are the known values of the label `handler`. `start_time_s` is Unix time.
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
        self._routes = frozenset(routes)
        self._vllm_labels: Labels = (("model_name", model_name), ("engine", "0"))
        self._page: dict[str, Instrument] = {}  # in the order in which it is shown
        self._add_numbers()
        self._add_histograms(bounds_1_2_5(max_context_tokens))
        self._add_ours(version, start_time_s)

    def _add(
        self, kind: Kind, name: str, help_text: str, bounds: Bounds = (), *label_names: str
    ) -> Instrument:
        self._page[name] = Instrument(kind, help_text, bounds, *label_names)
        return self._page[name]

    def _add_numbers(self) -> None:
        gauge, total = partial(self._add, "gauge"), partial(self._add, "counter")
        self.num_running = gauge("vllm:num_requests_running", "In prefill or decode.")
        self.num_waiting = gauge("vllm:num_requests_waiting", "In the queue.")
        self.kv_usage = gauge("vllm:kv_cache_usage_perc", "Of the memory for sequences, 0 to 1.")
        self._page["llamacpp:requests_processing"] = self.num_running
        self._page["llamacpp:requests_deferred"] = self.num_waiting
        self.prompt_tokens = total("vllm:prompt_tokens_total", "Prompt tokens, cached or not.")
        self.cached_tokens = total("vllm:prompt_tokens_cached_total", "Prompt tokens not computed.")
        self.output_tokens = total("vllm:generation_tokens_total", "Output tokens.")
        ended = total("vllm:request_success_total", "Ended sequences.", (), "finished_reason")
        self.num_finished = {why: ended.labels(why) for why in ("stop", "length", "abort", "error")}
        self.num_finished["displaced"] = self.num_finished["error"]
        self.num_finished["cancelled"] = self.num_finished["abort"]  # our word, vLLM's word
        self.num_asked = total("vllm:prefix_cache_queries_total", "Tokens looked for.")
        self.num_hits = total("vllm:prefix_cache_hits_total", "Tokens found.")
        self.num_preempted = total("vllm:num_preemptions_total", "Sequences that gave way.")
        # llama-server's total leaves out cached tokens, vLLM's includes them: two instruments.
        self.computed_tokens = total("llamacpp:prompt_tokens_total", "Prompt tokens computed.")
        self._page["llamacpp:tokens_predicted_total"] = self.output_tokens
        self._page["llamacpp:prompt_tokens_cached_total"] = self.cached_tokens
        self.prompt_s = total("llamacpp:prompt_seconds_total", "Spent on prompts.")
        self.output_s = total("llamacpp:tokens_predicted_seconds_total", "Spent on outputs.")
        self.num_decodes = total("llamacpp:n_decode_total", "Steps that ran the model.")
        self.prompt_rate = gauge("llamacpp:prompt_tokens_seconds", "Mean rate on prompts.")
        self.output_rate = gauge("llamacpp:predicted_tokens_seconds", "Mean rate on outputs.")
        self.busy_rows = gauge("llamacpp:n_busy_slots_per_decode", "Mean rows of a step.")

    def _add_histograms(self, tokens: Bounds) -> None:
        add = partial(self._add, "histogram")
        self.ttft_s = add("vllm:time_to_first_token_seconds", "Arrival to first token.", TTFT_S)
        self.itl_s = add("vllm:inter_token_latency_seconds", "One token to the next.", ITL_S)
        self.e2e_s = add("vllm:e2e_request_latency_seconds", "Arrival to end.", E2E_S)
        self.queue_s = add("vllm:request_queue_time_seconds", "Arrival to start.", E2E_S)
        self.prefill_s = add("vllm:request_prefill_time_seconds", "Start to first token.", E2E_S)
        self.decode_s = add("vllm:request_decode_time_seconds", "First token to last.", E2E_S)
        self.inference_s = add("vllm:request_inference_time_seconds", "Start to end.", E2E_S)
        self.tpot_s = add(
            "vllm:request_time_per_output_token_seconds", "Mean of a sequence.", ITL_S
        )
        self.max_output = add("vllm:request_params_max_tokens", "What was asked for.", tokens)
        self.num_prompt = add("vllm:request_prompt_tokens", "Of an ended sequence.", tokens)
        self.num_output = add("vllm:request_generation_tokens", "Of an ended sequence.", tokens)
        self.step_tokens = add("vllm:iteration_tokens_total", "Tokens in a step.", ITERATION_TOKENS)
        step_s = add("mlxlite:step_seconds", "Parts of a tick.", STEP_S, "phase")
        self.schedule_s, self.device_thread_s = step_s.labels("schedule"), step_s.labels("lane")
        self.deliver_s, self.build_s = step_s.labels("deliver"), step_s.labels("build")
        self.dispatch_s, self.wait_s = step_s.labels("dispatch"), step_s.labels("wait")
        self.batch_rows = add("mlxlite:batch_rows", "Rows of a step that decodes.", BATCH_ROWS)
        self.lag_s = add("mlxlite:loop_lag_seconds", "How late the loop woke up.", STEP_S)

    def _add_ours(self, version: str, start_time_s: float) -> None:
        gauge, total = partial(self._add, "gauge"), partial(self._add, "counter")
        self.connections = gauge("mlxlite:connections", "Open HTTP connections.")
        cut = total("mlxlite:connections_cut_total", "Slow readers cut off.", (), "reason")
        self.num_cut = {why: cut.labels(why) for why in CUT_REASONS}
        dropped = "Lines that a full standard stream did not take."
        self.num_dropped = total("mlxlite:log_records_dropped_total", dropped)
        held = gauge("mlxlite:prefix_cache_bytes", "Held by the prefix cache.", (), "where")
        self.memory_bytes, self.disk_bytes = held.labels("memory"), held.labels("disk")
        self.num_evicted = total("mlxlite:prefix_cache_evictions_total", "Prefixes that gave way.")
        self.num_loaded = total("mlxlite:prefix_cache_disk_loads_total", "Prefixes read from disk.")
        self.num_ignored = total("mlxlite:ignored_fields_total", "Unknown fields in requests.")
        # vLLM has this one from its web framework, and so without a prefix.
        labels = ("handler", "method", "status")
        self.http_requests = total("http_requests_total", "HTTP requests answered.", (), *labels)
        started = "When the server started, in Unix time."
        gauge("mlxlite:process_start_time_seconds", started).number = start_time_s
        info = gauge("mlxlite:info", "Always 1; the label says it.", (), "version")
        info.labels(version).number = 1

    def queued(self, n: int) -> None:
        self.num_waiting.number = n

    def running(self, n: int) -> None:
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
        """`num` more output tokens of any sequences; first tokens included."""
        self.output_tokens.number += num

    def token_gap(self, seconds: float) -> None:
        self.itl_s.observe(seconds)

    def step(
        self,
        num_rows: int,
        num_prefill_tokens: int,
        schedule_s: float,
        device_thread_s: float,
        deliver_s: float,
    ) -> None:
        """One tick. A step that only releases or admits rows is timed, but is no batch."""
        self.schedule_s.observe(schedule_s)
        self.device_thread_s.observe(device_thread_s)
        self.deliver_s.observe(deliver_s)
        if num_rows + num_prefill_tokens:
            self.num_decodes.number += 1
            self.step_tokens.observe(num_rows + num_prefill_tokens)
        if num_rows:
            self.batch_rows.observe(num_rows)

    def device(self, build_s: float, dispatch_s: float, wait_s: float) -> None:
        """The device thread's time for one step: its graph, its dispatch, the wait for tokens."""
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
        """The times of an ended sequence, and its limit of output tokens."""
        self.prompt_s.number += usage.prefill_s
        self.output_s.number += usage.decode_s
        self.prefill_s.observe(usage.prefill_s)
        self.decode_s.observe(usage.decode_s)
        self.inference_s.observe(usage.prefill_s + usage.decode_s)
        if usage.num_output > 1:
            self.tpot_s.observe(usage.decode_s / (usage.num_output - 1))
        self.max_output.observe(max_tokens)

    def preempted(self) -> None:
        self.num_preempted.number += 1

    def memory(self, num_bytes: int, max_bytes: int | None) -> None:
        """The bytes that sequences hold now; `max_bytes` is their limit."""
        self.kv_usage.number = num_bytes / max_bytes if max_bytes else 0.0

    def prefix_cache(self, stats: CacheStats) -> None:
        """The prefix cache's own totals and sizes, as they are now."""
        self.num_asked.number, self.num_hits.number = stats.num_asked, stats.num_hit
        self.num_evicted.number, self.num_loaded.number = stats.num_evicted, stats.num_from_disk
        self.memory_bytes.number, self.disk_bytes.number = stats.num_bytes, stats.disk_bytes

    def loop_lag(self, seconds: float) -> None:
        self.lag_s.observe(seconds)

    def http(self, handler: str, method: str, status: int) -> None:
        """An HTTP request was answered; `handler` is the route that matched, not the path."""
        assert 100 <= status <= 599, status
        known_handler = handler if handler in self._routes else OTHER
        known_method = method if method in METHODS else OTHER
        self.http_requests.labels(known_handler, known_method, f"{status // 100}xx").number += 1

    def connection_opened(self) -> None:
        self.connections.number += 1

    def connection_closed(self) -> None:
        self.connections.number -= 1

    def connection_cut(self, reason: str) -> None:
        """A reader with unsent bytes was disconnected."""
        self.num_cut[reason].number += 1

    def records_dropped(self, num: int) -> None:
        """All lines that standard streams dropped so far."""
        self.num_dropped.number = num

    def ignored_fields(self, num: int) -> None:
        self.num_ignored.number += num

    def _set_means(self) -> None:
        self.prompt_rate.number = self.computed_tokens.number / (self.prompt_s.number or 1)
        self.output_rate.number = self.output_tokens.number / (self.output_s.number or 1)
        self.busy_rows.number = self.batch_rows.number / (self.num_decodes.number or 1)

    def render_prometheus(self) -> bytes:
        """The Prometheus text format, version 0.0.4, in UTF-8."""
        self._set_means()
        lines: list[str] = []
        for name, instrument in self._page.items():
            lines += instrument.lines(name, self._vllm_labels if name.startswith("vllm:") else ())
        # A model's path may hold bytes that are not UTF-8 (surrogate escapes): shown as "?".
        return "".join(f"{line}\n" for line in lines).encode("utf-8", errors="replace")

    def seed_json(self, max_batch_size: int) -> dict[str, float | int]:
        """Nine totals. A batch is a step that decodes; latency is end to end."""
        return {
            "waiting_requests": int(self.num_waiting.number),
            "running_requests": int(self.num_running.number),
            "max_batch_size": max_batch_size,
            "total_requests_processed": self.e2e_s.count,
            "total_batches_processed": self.batch_rows.count,
            "avg_batch_size": self.batch_rows.mean,
            "avg_latency_ms": self.e2e_s.mean * 1000,
            "cache_hit_rate": self.cached_tokens.number / (self.prompt_tokens.number or 1),
            "total_tokens_generated": int(self.output_tokens.number),
        }


def bounds_1_2_5(max_value: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, … up to `max_value`, as in vLLM."""
    assert max_value >= 1
    digits = range(len(str(max_value)))
    series = (mantissa * 10**digit for digit in digits for mantissa in (1, 2, 5))
    return tuple(bound for bound in series if bound <= max_value)


def _sample(name: str, labels: list[str], value: float) -> str:
    return f"{name}{{{','.join(labels)}}} {_text(value)}" if labels else f"{name} {_text(value)}"


def _text(value: float) -> str:
    return _NOT_FINITE.get(text := repr(value), text)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _label(name: str, value: str) -> str:
    escaped = _escaped(value).replace('"', r"\"")
    return f'{name}="{escaped}"'
