"""Metrics: each event changes its instruments, shown under all their names in the text format."""

import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from mlxlite.engine.sequence import Usage
from mlxlite.metrics import (
    CONTENT_TYPE,
    ITL_S,
    METHODS,
    Instrument,
    Kind,
    Metrics,
    bounds_1_2_5,
)
from mlxlite.prefix_cache.operations import CacheStats

ROUTES = ("/v1/chat/completions", "/health")
START_S = 1_790_000_000.5


def new_metrics(model_name: str = "a-model") -> Metrics:
    return Metrics(model_name=model_name, version="1.2.3", start_time_s=START_S, routes=ROUTES)


def used_metrics() -> Metrics:
    """Two sequences, one of them cancelled, three steps and some HTTP."""
    metrics = new_metrics()
    metrics.queued(3)
    metrics.running(2)
    metrics.prompt_done(100, 0.25, num_cached=64)
    metrics.prompt_done(28, 0.5)
    metrics.first_token(0.3)
    metrics.first_token(0.7)
    metrics.step(0, 128, 0.001, 0.2, 0.002)
    metrics.device(0.003, 0.1, 0.05)
    metrics.step(2, 0, 0.001, 0.02, 0.002)
    metrics.step(1, 7, 0.001, 0.02, 0.002)
    metrics.step(0, 0, 0.001, 0.0, 0.0)
    metrics.tokens(2)
    metrics.tokens(1)
    metrics.token_gap(0.02)
    metrics.finished("stop", 1.5, 100, 2)
    metrics.finished("cancelled", 0.5, 28, 1)
    metrics.loop_lag(0.0002)
    metrics.http("/health", "GET", 200)
    metrics.http("/health", "GET", 204)
    metrics.connection_opened()
    metrics.connection_opened()
    metrics.connection_cut("stalled")
    metrics.records_dropped(2)
    metrics.connection_closed()
    metrics.ignored_fields(4)
    stats = CacheStats(num_bytes=500, disk_bytes=70, num_asked=128, num_hit=64)
    stats.num_evicted, stats.num_from_disk = 3, 2
    metrics.prefix_cache(stats)
    return metrics


# --- a strict reader of the text format ---------------------------------------------------------

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
NUMBER = r"[+-]?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|Inf)|NaN"
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? ({NUMBER})")
HELP = re.compile(rf"# HELP ({NAME}) ((?:[^\\\n]|\\[\\n])*)")
TYPE = re.compile(rf"# TYPE ({NAME}) (counter|gauge|histogram)")

Key = tuple[tuple[str, str], ...]


@dataclass
class Parsed:
    """One family: its type, and its samples by name and labels, in their order."""

    name: str
    kind: str
    samples: dict[tuple[str, Key], float] = field(default_factory=dict)

    def allows(self, name: str) -> bool:
        if self.kind == "histogram":
            return name in {f"{self.name}_{part}" for part in ("bucket", "sum", "count")}
        return name == self.name


def parse(data: bytes) -> dict[str, Parsed]:
    """Fails on anything but HELP, TYPE, samples; each family, name and label set once."""
    text = data.decode("utf-8")
    assert text.endswith("\n")
    families: dict[str, Parsed] = {}
    samples: set[tuple[str, Key]] = set()  # of all families: none has another's name
    lines = iter(text[:-1].split("\n"))
    family = None
    for line in lines:
        if help_line := HELP.fullmatch(line):
            type_line = TYPE.fullmatch(next(lines))
            assert type_line, line
            assert type_line[1] == help_line[1]
            assert help_line[1] not in families
            family = families[help_line[1]] = Parsed(help_line[1], type_line[2])
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        assert family, line
        assert family.allows(sample[1]), line
        labels = tuple(
            (name, unescape(value)) for name, value in re.findall(LABEL, sample[2] or "")
        )
        assert len(dict(labels)) == len(labels), line
        assert (sample[1], labels) not in samples, line
        samples.add((sample[1], labels))
        family.samples[sample[1], labels] = float(sample[sample.lastindex or 0])
    return families


def unescape(value: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], value)


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """The one sample of this name that has these labels, and perhaps others."""
    found = [
        number
        for family in parse(metrics.render_prometheus()).values()
        for (sample_name, key), number in family.samples.items()
        if sample_name == name and labels.items() <= dict(key).items()
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def histograms(data: bytes) -> Iterator[tuple[list[tuple[float, float]], float, float]]:
    """Of each series of each histogram: its (le, count) buckets, its count and its sum."""
    for family in parse(data).values():
        if family.kind != "histogram":
            continue
        series = dict.fromkeys(
            tuple(pair for pair in key if pair[0] != "le") for _, key in family.samples
        )
        for own in series:
            buckets = [
                (float(dict(key)["le"]), count)
                for (name, key), count in family.samples.items()
                if name == f"{family.name}_bucket" and key[:-1] == own
            ]
            yield (
                buckets,
                family.samples[f"{family.name}_count", own],
                family.samples[f"{family.name}_sum", own],
            )


# --- the text format ----------------------------------------------------------------------------


def text_of(instrument: Instrument, name: str, fixed: Key = ()) -> str:
    return "".join(f"{line}\n" for line in instrument.lines(name, fixed))


def test_each_kind_is_shown_exactly_so_under_every_name() -> None:
    steps = Instrument("counter", "All steps.\nWith a \\ in it.")
    level = Instrument("gauge", "Now.", (), "room")
    wait = Instrument("histogram", "Waits.", (0.1, 1.0, 1000000), "kind")
    steps.number += 3
    level.labels("b").number = 2.5
    wait.labels("b").observe(0.1)
    wait.labels("a").observe(0.25)
    wait.labels("a").observe(1.5)
    text = text_of(steps, "steps_total") + text_of(level, "level", (("house", "1"),))
    text += text_of(steps, "also_total", (("by", "us"),)) + text_of(wait, "wait_seconds")
    assert text == (
        "# HELP steps_total All steps.\\nWith a \\\\ in it.\n"
        "# TYPE steps_total counter\n"
        "steps_total 3\n"
        "# HELP level Now.\n"
        "# TYPE level gauge\n"
        'level{house="1",room="b"} 2.5\n'
        "# HELP also_total All steps.\\nWith a \\\\ in it.\n"
        "# TYPE also_total counter\n"
        'also_total{by="us"} 3\n'
        "# HELP wait_seconds Waits.\n"
        "# TYPE wait_seconds histogram\n"
        'wait_seconds_bucket{kind="a",le="0.1"} 0\n'
        'wait_seconds_bucket{kind="a",le="1.0"} 1\n'
        'wait_seconds_bucket{kind="a",le="1000000.0"} 2\n'
        'wait_seconds_bucket{kind="a",le="+Inf"} 2\n'
        'wait_seconds_sum{kind="a"} 1.75\n'
        'wait_seconds_count{kind="a"} 2\n'
        'wait_seconds_bucket{kind="b",le="0.1"} 1\n'
        'wait_seconds_bucket{kind="b",le="1.0"} 1\n'
        'wait_seconds_bucket{kind="b",le="1000000.0"} 1\n'
        'wait_seconds_bucket{kind="b",le="+Inf"} 1\n'
        'wait_seconds_sum{kind="b"} 0.1\n'
        'wait_seconds_count{kind="b"} 1\n'
    )


def test_the_content_type_is_that_of_the_text_format() -> None:
    assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize("metrics", [new_metrics(), used_metrics()], ids=["new", "used"])
def test_every_line_parses(metrics: Metrics) -> None:
    families = parse(metrics.render_prometheus())
    assert all(family.samples or name == "http_requests_total" for name, family in families.items())


def test_promtool_accepts_every_line() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; test_every_line_parses stands in for it")
    page = used_metrics().render_prometheus()
    checked = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True)
    assert checked.returncode in (0, 3), checked.stderr  # 3: only its opinions about names


@pytest.mark.parametrize("text", ['"', "\\", "\n", '\\"\n\\n', "模型", 'a{b="c"} 1', ""])
def test_label_values_survive_rendering_and_parsing(text: str) -> None:
    metrics = new_metrics(model_name=text)
    family = parse(metrics.render_prometheus())["vllm:num_requests_running"]
    assert list(family.samples) == [(family.name, (("model_name", text), ("engine", "0")))]


def test_a_model_name_that_is_no_unicode_does_not_break_the_page() -> None:
    parse(new_metrics(model_name=b"mod\xffel".decode(errors="surrogateescape")).render_prometheus())


def test_extreme_numbers_are_written_as_prometheus_reads_them() -> None:
    gauge = Instrument("gauge", "G.", (), "n")
    for number in (math.inf, -math.inf, math.nan, 1e300, 1e-9, -3, 2**60):
        gauge.labels(str(number)).number = number
    samples = parse(text_of(gauge, "g").encode())["g"].samples
    for (_, key), number in samples.items():
        assert str(float(dict(key)["n"])) == str(number)


def test_the_same_calls_give_the_same_bytes() -> None:
    assert used_metrics().render_prometheus() == used_metrics().render_prometheus()
    metrics = used_metrics()
    assert metrics.render_prometheus() == metrics.render_prometheus()


def test_the_order_of_label_sets_is_not_that_of_the_calls() -> None:
    one, two = new_metrics(), new_metrics()
    calls = [("/health", "GET", 200), ("/v1/chat/completions", "POST", 500), ("/x", "GET", 404)]
    for call in calls:
        one.http(*call)
    for call in reversed(calls):
        two.http(*call)
    assert one.render_prometheus() == two.render_prometheus()


# --- instruments --------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(), (2, 1), (1, 1), (1, math.inf), (math.nan, 1)])
def test_bad_bounds_are_an_assertion_error(bounds: tuple[float, ...]) -> None:
    with pytest.raises(AssertionError):
        Instrument("histogram", "", bounds)


@pytest.mark.parametrize("kind", ["counter", "gauge"])
def test_bounds_without_a_histogram_are_an_assertion_error(kind: Kind) -> None:
    with pytest.raises(AssertionError):
        Instrument(kind, "", (1,))


def test_the_wrong_number_of_label_values_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError):
        Instrument("counter", "", (), "a", "b").labels("only one")


# --- histograms ---------------------------------------------------------------------------------


def test_buckets_are_cumulative_and_end_with_the_count() -> None:
    metrics = used_metrics()
    for number in range(200):
        metrics.token_gap(number / 2)
    seen = list(histograms(metrics.render_prometheus()))
    assert len(seen) == 20
    for buckets, count, _ in seen:
        assert buckets == sorted(buckets)
        assert [num for _, num in buckets] == sorted(num for _, num in buckets)
        assert buckets[-1] == (math.inf, count)


def test_an_observation_counts_from_its_own_bound_upwards() -> None:
    histogram = Instrument("histogram", "", ITL_S)
    for bound in ITL_S:
        histogram.observe(bound)
    assert histogram.counts == [1] * len(ITL_S) + [0]
    histogram.observe(math.nextafter(ITL_S[-1], math.inf))
    assert histogram.counts[-1] == 1
    assert histogram.number == pytest.approx(sum(ITL_S) + ITL_S[-1])


def test_the_sum_over_the_count_is_the_mean() -> None:
    histogram = Instrument("histogram", "", (1,))
    assert histogram.mean == 0.0
    for number in (1, 2, 6):
        histogram.observe(number)
    assert histogram.mean == 3


def test_token_bounds_are_the_1_2_5_series_up_to_the_context() -> None:
    assert bounds_1_2_5(1) == (1,)
    assert bounds_1_2_5(4096) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    assert bounds_1_2_5(5000)[-1] == 5000


# --- the server's instruments -------------------------------------------------------------------

VLLM = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "prompt_tokens_total": "counter",
    "prompt_tokens_cached_total": "counter",
    "generation_tokens_total": "counter",
    "request_success_total": "counter",
    "prefix_cache_queries_total": "counter",
    "prefix_cache_hits_total": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "iteration_tokens_total": "histogram",
    "kv_cache_usage_perc": "gauge",
    "num_preemptions_total": "counter",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "request_params_max_tokens": "histogram",
}
OTHERS = {
    "llamacpp:prompt_tokens_cached_total": "counter",
    "llamacpp:prompt_seconds_total": "counter",
    "llamacpp:tokens_predicted_seconds_total": "counter",
    "llamacpp:prompt_tokens_total": "counter",
    "llamacpp:tokens_predicted_total": "counter",
    "llamacpp:requests_processing": "gauge",
    "llamacpp:requests_deferred": "gauge",
    "llamacpp:n_decode_total": "counter",
    "llamacpp:prompt_tokens_seconds": "gauge",
    "llamacpp:predicted_tokens_seconds": "gauge",
    "llamacpp:n_busy_slots_per_decode": "gauge",
    "mlxlite:step_seconds": "histogram",
    "mlxlite:batch_rows": "histogram",
    "mlxlite:loop_lag_seconds": "histogram",
    "mlxlite:connections": "gauge",
    "mlxlite:connections_cut_total": "counter",
    "mlxlite:log_records_dropped_total": "counter",
    "mlxlite:prefix_cache_bytes": "gauge",
    "mlxlite:prefix_cache_evictions_total": "counter",
    "mlxlite:prefix_cache_disk_loads_total": "counter",
    "mlxlite:ignored_fields_total": "counter",
    "mlxlite:process_start_time_seconds": "gauge",
    "mlxlite:info": "gauge",
    "http_requests_total": "counter",
}


def test_all_names_are_there_from_the_start_with_their_types() -> None:
    families = parse(new_metrics().render_prometheus())
    expected = {f"vllm:{name}": kind for name, kind in VLLM.items()} | OTHERS
    assert {name: family.kind for name, family in families.items()} == expected


def test_the_times_of_ended_sequences_preemptions_and_memory_are_counted() -> None:
    metrics = new_metrics()
    metrics.times(Usage(num_output=5, prefill_s=0.5, decode_s=2.0), 100)
    metrics.times(Usage(num_output=1, prefill_s=0.25), 7)
    metrics.preempted()
    metrics.memory(25, 100)
    families = parse(metrics.render_prometheus())

    def number(name: str) -> float:
        family, _, kind = name.rpartition("_")
        family = family if kind in ("sum", "count") else name
        values = [value for (own, _), value in families[family].samples.items() if own == name]
        assert len(values) == 1
        return float(values[0])

    assert number("vllm:request_prefill_time_seconds_sum") == 0.75
    assert number("vllm:request_decode_time_seconds_sum") == 2.0
    assert number("vllm:request_inference_time_seconds_sum") == 2.75
    assert number("vllm:request_inference_time_seconds_count") == 2
    assert number("vllm:request_time_per_output_token_seconds_sum") == 0.5
    assert number("vllm:request_time_per_output_token_seconds_count") == 1, "one token has no gap"
    assert number("vllm:request_params_max_tokens_sum") == 107
    assert number("llamacpp:prompt_seconds_total") == 0.75
    assert number("llamacpp:tokens_predicted_seconds_total") == 2.0
    rates = ("prompt_tokens_seconds", "predicted_tokens_seconds", "n_busy_slots_per_decode")
    assert all(number(f"llamacpp:{name}") >= 0 for name in rates)
    assert number("vllm:num_preemptions_total") == 1
    assert number("vllm:kv_cache_usage_perc") == 0.25
    metrics.memory(25, None)
    assert metrics.kv_usage.number == 0.0, "without a bound there is no share"


def test_each_vllm_sample_has_the_labels_its_dashboards_filter_by() -> None:
    families = parse(used_metrics().render_prometheus())
    for name in VLLM:
        for _, key in families[f"vllm:{name}"].samples:
            assert key[:2] == (("model_name", "a-model"), ("engine", "0"))


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("vllm:num_requests_running", {}, 2),
        ("llamacpp:requests_processing", {}, 2),
        ("vllm:num_requests_waiting", {}, 3),
        ("llamacpp:requests_deferred", {}, 3),
        ("vllm:prompt_tokens_total", {}, 128),
        ("vllm:prompt_tokens_cached_total", {}, 64),
        ("llamacpp:prompt_tokens_total", {}, 64),
        ("vllm:generation_tokens_total", {}, 3),
        ("llamacpp:tokens_predicted_total", {}, 3),
        ("llamacpp:n_decode_total", {}, 3),
        ("vllm:request_success_total", {"finished_reason": "stop"}, 1),
        ("vllm:request_success_total", {"finished_reason": "length"}, 0),
        ("vllm:request_success_total", {"finished_reason": "abort"}, 1),
        ("vllm:request_success_total", {"finished_reason": "error"}, 0),
        ("vllm:time_to_first_token_seconds_sum", {}, 1.0),
        ("vllm:time_to_first_token_seconds_bucket", {"le": "0.5"}, 1),
        ("vllm:inter_token_latency_seconds_count", {}, 1),
        ("vllm:e2e_request_latency_seconds_sum", {}, 2.0),
        ("vllm:request_queue_time_seconds_sum", {}, 0.75),
        ("vllm:request_prompt_tokens_sum", {}, 128),
        ("vllm:request_generation_tokens_sum", {}, 3),
        ("vllm:iteration_tokens_total_sum", {}, 138),
        ("vllm:iteration_tokens_total_count", {}, 3),
        ("mlxlite:batch_rows_sum", {}, 3),
        ("mlxlite:batch_rows_count", {}, 2),
        ("mlxlite:step_seconds_count", {"phase": "schedule"}, 4),
        ("mlxlite:step_seconds_sum", {"phase": "lane"}, 0.24),
        ("mlxlite:step_seconds_sum", {"phase": "deliver"}, 0.006),
        ("mlxlite:step_seconds_sum", {"phase": "build"}, 0.003),
        ("mlxlite:step_seconds_sum", {"phase": "dispatch"}, 0.1),
        ("mlxlite:step_seconds_sum", {"phase": "wait"}, 0.05),
        ("mlxlite:loop_lag_seconds_bucket", {"le": "0.00025"}, 1),
        ("mlxlite:loop_lag_seconds_bucket", {"le": "0.0001"}, 0),
        ("vllm:prefix_cache_queries_total", {}, 128),
        ("vllm:prefix_cache_hits_total", {}, 64),
        ("mlxlite:prefix_cache_bytes", {"where": "memory"}, 500),
        ("mlxlite:prefix_cache_bytes", {"where": "disk"}, 70),
        ("mlxlite:prefix_cache_evictions_total", {}, 3),
        ("mlxlite:prefix_cache_disk_loads_total", {}, 2),
        ("mlxlite:connections", {}, 1),
        ("mlxlite:connections_cut_total", {"reason": "stalled"}, 1),
        ("mlxlite:connections_cut_total", {"reason": "slow"}, 0),
        ("mlxlite:log_records_dropped_total", {}, 2),
        ("mlxlite:ignored_fields_total", {}, 4),
        ("mlxlite:process_start_time_seconds", {}, START_S),
        ("mlxlite:info", {"version": "1.2.3"}, 1),
        ("http_requests_total", {"handler": "/health", "method": "GET", "status": "2xx"}, 2),
    ],
)
def test_each_event_is_shown(name: str, labels: dict[str, str], expected: float) -> None:
    assert value(used_metrics(), name, **labels) == pytest.approx(expected)


def test_the_prefix_cache_is_shown_as_it_was_last_reported() -> None:
    metrics = used_metrics()
    metrics.prefix_cache(CacheStats(num_bytes=1, num_asked=130, num_hit=64))
    assert value(metrics, "mlxlite:prefix_cache_bytes", where="memory") == 1
    assert value(metrics, "mlxlite:prefix_cache_bytes", where="disk") == 0
    assert value(metrics, "vllm:prefix_cache_queries_total") == 130


@pytest.mark.parametrize("reason", ["stop", "length", "cancelled", "abort", "error"])
def test_each_reason_ends_in_one_count_and_one_latency(reason: str) -> None:
    metrics = new_metrics()
    metrics.finished(reason, 1.0, 1, 1)
    samples = parse(metrics.render_prometheus())["vllm:request_success_total"].samples
    assert sum(samples.values()) == 1
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 1


def test_an_unknown_route_or_method_is_other() -> None:
    metrics = new_metrics()
    for number in range(1000):
        metrics.http(f"/{number}", f"M{number}", 404)
    labels = (("handler", "other"), ("method", "other"), ("status", "4xx"))
    samples = parse(metrics.render_prometheus())["http_requests_total"].samples
    assert samples == {("http_requests_total", labels): 1000}


def test_every_known_route_method_and_status_has_its_own_count() -> None:
    metrics = new_metrics()
    calls = [
        (handler, method, status)
        for handler in (*ROUTES, "other")
        for method in (*METHODS, "other")
        for status in (100, 200, 302, 404, 599)
    ]
    for call in calls:
        metrics.http(*call)
    samples = parse(metrics.render_prometheus())["http_requests_total"].samples
    assert len(samples) == len(calls)
    assert set(samples.values()) == {1}


# --- the JSON -----------------------------------------------------------------------------------


def test_the_json_has_nine_values_and_they_are_correct() -> None:
    assert used_metrics().seed_json(max_batch_size=8) == {
        "waiting_requests": 3,
        "running_requests": 2,
        "max_batch_size": 8,
        "total_requests_processed": 2,
        "total_batches_processed": 2,
        "avg_batch_size": 1.5,
        "avg_latency_ms": 1000.0,
        "cache_hit_rate": 0.5,
        "total_tokens_generated": 3,
    }


def test_the_json_of_an_idle_server_is_zeros() -> None:
    seed = new_metrics().seed_json(max_batch_size=0)
    assert set(seed.values()) == {0}
    assert {name for name, number in seed.items() if isinstance(number, float)} == {
        "avg_batch_size",
        "avg_latency_ms",
        "cache_hit_rate",
    }
