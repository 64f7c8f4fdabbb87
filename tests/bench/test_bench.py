"""The benchmark's arithmetic: figures of traces, ratios and verdicts, loads, plots, its README."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import pytest

from bench import compare, plots, report, scenarios
from bench.__main__ import parse
from bench.compare import Comparison, Verdict, at_least, at_most
from bench.measurements.latency import at, percentiles
from bench.measurements.lost import Sample, stopped_s
from bench.models import Writer, save_endless
from bench.peers import OURS, PEERS, Peer
from bench.plan import Feed, Plan, Request, Stream, Trace

ROOT = Path(__file__).parents[2]


@pytest.fixture
def writer() -> Writer:
    """Words are tokens here."""
    return Writer(lambda text: tuple(range(len(text.split()))))


# --- plans and traces -------------------------------------------------------------------------


def stream(client: int, sent_s: float, *token_s: float, ended_s: float | None = None) -> Stream:
    return Stream(client, sent_s, sent_s, list(token_s), len(token_s), ended_s=ended_s)


def test_wall_times_run_from_the_first_request_to_the_last_token_and_to_the_last_byte() -> None:
    trace = Trace((stream(0, 1.0, 2.0, 3.0, ended_s=3.5), stream(1, 1.5, 4.0, ended_s=4.25)))
    assert (trace.wall_s, trace.last_byte_s) == (3.0, 3.25)
    assert trace.whole_rate == 1.0
    assert trace.ttfts == [1.0, 2.5]


def test_a_trace_survives_the_load_generators_json() -> None:
    own = stream(0, 1.0, 2.0, ended_s=2.5)
    own.left_s = 2.25
    assert Trace.from_json(json.loads(json.dumps([asdict(own)]))).streams == (own,)


def test_a_plan_gives_the_load_generator_every_setting_of_a_request() -> None:
    asked = Request("hi", (1,), 5, is_streamed=False, at_s=2.0, leave_after_s=3.0)
    given = Plan([[asked]]).as_json()["first"][0][0]
    assert (given["at_s"], given["leave_after_s"], given["leave_after_tokens"]) == (2.0, 3.0, None)
    assert given["body"]["stream"] is False
    assert "stream_options" not in given["body"]


def test_an_arm_without_http_refuses_a_request_that_needs_it() -> None:
    with pytest.raises(AssertionError, match="load generator"):
        Feed(Plan([[Request("hi", (1,), 5, at_s=1.0)]]))


# --- loads ------------------------------------------------------------------------------------


def test_arrivals_are_reproducible_by_seed_and_have_the_given_rate() -> None:
    first = list(scenarios.arrivals(4000, 10.0, seed=3))
    assert first == list(scenarios.arrivals(4000, 10.0, seed=3))
    assert first != list(scenarios.arrivals(4000, 10.0, seed=4))
    assert first == sorted(first)
    assert math.isclose(4000 / first[-1], 10.0, rel_tol=0.1)


def test_an_open_loop_is_clients_with_one_request_each_at_its_time(writer: Writer) -> None:
    plan = scenarios.open_loop(writer, 5, 2.0, 8, seed=1)
    assert [len(requests) for requests in plan.first] == [1] * 5
    times = [requests[0].at_s for requests in plan.first]
    assert times == list(scenarios.arrivals(5, 2.0, seed=1))


def test_settings_of_two_turns_have_no_value_in_common_that_is_sampled_with() -> None:
    seen: set[str] = set()
    for turn in range(8):
        now = {json.dumps(own) for own in scenarios.mixed_settings(turn) if len(own) > 1}
        assert not now & seen
        seen |= now


def test_a_family_begins_alike_and_ends_differently(writer: Writer) -> None:
    texts = [request.text for request in scenarios.family(writer, 50, 4)]
    beginnings = {" ".join(text.split()[:50]) for text in texts}
    assert (len(beginnings), len(set(texts))) == (1, 4)


def test_later_turns_of_a_conversation_are_marked_as_such(writer: Writer) -> None:
    plan = scenarios.conversations(writer, 2, 3, 40, 8)
    assert [[r.is_next_turn for r in own] for own in plan.first] == [[False, True, True]] * 2


def test_the_forerunners_cases_are_all_there() -> None:
    cases = {(c.num_clients, c.max_tokens, c.temperature) for c in scenarios.SEED_CASES}
    assert cases == {(c, n, t) for c in (2, 4, 8) for n in (50, 100) for t in (0.7, 0.1)}


# --- ratios -----------------------------------------------------------------------------------


def comparison(ours: list[float], theirs: list[float], asked: compare.Asked | None) -> Comparison:
    return Comparison("speed", "tok/s", ours, theirs, "peer", asked)


@pytest.mark.parametrize(
    ("ours", "asked", "verdict"),
    [
        ([2.0, 2.2], at_least(1.5), Verdict.YES),
        ([2.0, 2.2], at_most(1.5), Verdict.NO),
        ([1.4, 1.6], at_least(1.5), Verdict.OPEN),
        ([1.4, 1.6], None, Verdict.NOT_ASKED),
        ([2.0], at_least(1.5), Verdict.OPEN),
    ],
)
def test_a_bound_is_kept_only_if_all_pairs_keep_it(
    ours: list[float], asked: compare.Asked | None, verdict: Verdict
) -> None:
    assert comparison(ours, [1.0] * len(ours), asked).verdict is verdict


def test_a_ratio_is_the_median_of_the_pairs_ratios() -> None:
    assert comparison([10.0, 4.0, 6.0], [1.0, 2.0, 2.0], None).ratio == 3.0


def test_pairs_that_disagree_and_lone_ones_are_marked() -> None:
    assert comparison([1.0, 1.3], [1.0, 1.0], None).is_noisy
    assert comparison([1.0], [1.0], None).is_noisy
    assert not comparison([1.0, 1.1], [1.0, 1.0], None).is_noisy
    assert compare.MARK in comparison([1.0, 1.3], [1.0, 1.0], None).row()[3]


def test_a_machine_is_quiet_if_no_other_process_ran_before_or_beside() -> None:
    assert report.quiet(before=0.3, after=3.0, num_cores=2) == "yes"
    assert report.quiet(before=0.9, after=3.0, num_cores=2).startswith("no: 0.9")
    assert report.quiet(before=0.3, after=5.0, num_cores=2).startswith("no: 5.0")


def test_a_comparison_survives_json() -> None:
    for asked in (None, at_most(0.8)):
        own = comparison([1.0, 2.0], [3.0, 4.0], asked)
        assert Comparison.from_json(json.loads(json.dumps(asdict(own)))) == own


def test_percentiles_run_from_the_least_to_the_greatest() -> None:
    values = [float(n) for n in range(1000, 0, -1)]
    found = percentiles(values)
    assert (len(found), found[0], found[-1]) == (101, 1.0, 1000.0)
    assert at(values, 0.5) == 501.0


# --- lost clients -----------------------------------------------------------------------------


def samples(*shares: float) -> list[Sample]:
    """A sample a second, and the share of a core used in each second."""
    return [Sample(float(n), sum(shares[:n])) for n in range(len(shares) + 1)]


def test_work_ends_with_the_last_stretch_that_was_as_busy_as_before() -> None:
    assert stopped_s(samples(1, 1, 1, 1, 0.01, 0.01), left_s=2.0) == 2.0
    assert stopped_s(samples(1, 1, 0.01, 1, 0.01, 0.01), left_s=2.0) == 2.0
    assert stopped_s(samples(1, 1, 0.2, 0.1), left_s=2.0) == 0.0


def test_what_is_busy_is_measured_by_what_the_server_used_itself() -> None:
    assert stopped_s(samples(0.5, 0.5, 0.2, 0.01), left_s=2.0) == 1.0
    assert stopped_s(samples(1, 1, 0.2, 0.01), left_s=2.0) == 0.0


def test_the_timers_of_an_idle_server_are_no_work() -> None:
    assert stopped_s(samples(0.1, 0.1, 0.08, 0.08), left_s=2.0) == 0.0


# --- models and peers -------------------------------------------------------------------------


def test_an_endless_copy_has_no_end_of_text_and_no_special_token(tmp_path: Path) -> None:
    source = ROOT / "mlxlite" / "demo"
    save_endless(source, tmp_path / "copy")
    for file in (tmp_path / "copy").glob("*.json"):
        assert '"eos_token' not in file.read_text()
    tokenizer = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    assert tokenizer["added_tokens"]
    assert not any(token["special"] for token in tokenizer["added_tokens"])
    weights = tmp_path / "copy" / "model.safetensors"
    assert weights.resolve() == (source / "model.safetensors").resolve()


def test_every_peer_gets_the_model_the_port_and_the_rows() -> None:
    for peer in PEERS:
        arguments = peer.command(Path("/models/m"), 4321, 8)
        assert {"/models/m", "4321", "8"} <= set(arguments), peer.name


def test_a_peer_that_is_not_installed_has_no_command() -> None:
    assert Peer("none", "there-is-no-such-program --port {port}").program is None


def test_the_command_line_refuses_a_section_or_a_peer_that_there_is_not() -> None:
    assert parse(["--only", "burst,lost", "--peers", "mlx-vlm"]).only == "burst,lost"
    for flags in (["--only", "nosuch"], ["--peers", "nosuch"]):
        with pytest.raises(SystemExit):
            parse(flags)


@pytest.mark.parametrize("is_plain", [True, False])
def test_the_plain_server_has_the_layers_that_mlx_lm_makes(is_plain: bool) -> None:
    """Through the composition root, as the program does."""
    program = f"""
import gc
from mlx import nn
from bench.serve_plain import use_plain_kernels
from mlxlite.server import load
from mlxlite.config.options import Config
if {is_plain}:
    use_plain_kernels()
kept = load(Config())
layers = [type(found) for found in gc.get_objects() if isinstance(found, nn.Module)]
print(any(layer.__module__.startswith("mlxlite") for layer in layers))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    has_forms = sys.platform == "linux" and not is_plain
    assert done.stdout.strip() == str(has_forms)


# --- plots and the README ---------------------------------------------------------------------


def run_of(*sections: dict[str, object]) -> dict[str, object]:
    return {"header": {"date": "today"}, "models": {"small": list(sections)}}


THROUGHPUT = {
    "section": "throughput",
    "figures": {f"C={c}": {"whole": {OURS: [2.0 * c], "mlx_lm.server": [1.0 * c]}} for c in (1, 8)},
}
OPENLOOP = {
    "section": "openloop",
    "figures": {"percentiles": {what: {OURS: [0.0, 0.1, 0.2]} for what in ("TTFT", "ITL")}},
}
LONGPROMPT = {
    "section": "longprompt",
    "figures": {"timeline": {OURS: {"points": [(0.1, 0.01), (0.2, 0.02)], "ttft_s": 0.3}}},
}
PREFIX = {
    "section": "prefix",
    "figures": {f"TTFT, {kind} prefix": {OURS: [0.1]} for kind in ("cold", "warm")},
}


def test_a_run_is_drawn_from_its_json_alone_and_only_what_was_measured() -> None:
    assert plots.draw(run_of()) == {}
    files = plots.draw(json.loads(json.dumps(run_of(THROUGHPUT, OPENLOOP, LONGPROMPT, PREFIX))))
    kinds = ("throughput", "ttft", "itl", "gaps", "warm")
    assert list(files) == [f"small-{kind}.svg" for kind in kinds]
    for svg in files.values():
        ElementTree.fromstring(svg)
        assert ">mlxlite</text>" in svg
    assert ">mlx_lm.server</text>" in files["small-throughput.svg"]


def test_ratios_on_equal_kernels_stand_first_under_their_heading() -> None:
    fitted = comparison([2.0, 2.0], [1.0, 1.0], None)
    equal = Comparison("speed", "tok/s", [3.0, 3.0], [2.0, 2.0], "peer", is_equal=True)
    text = compare.markdown([fitted, equal])
    places = [text.index(part) for part in (compare.EQUAL, "| 1.50 ", compare.FITTED, "| 2.00 ")]
    assert places == sorted(places)
    assert compare.EQUAL not in compare.markdown([fitted])


def test_the_tables_in_the_readme_are_those_of_the_runs_beside_it() -> None:
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\| .* \| (?:yes|no|not certain|) \|$", text, re.M))
    files = (ROOT / "bench" / "results").rglob("bench.md")
    kept = set(chain(*(file.read_text(encoding="utf-8").splitlines() for file in files)))
    assert len(shown) >= 20
    assert shown <= kept
    for plot in re.findall(r"\]\((results/\S+\.svg)\)", text):
        assert (ROOT / "bench" / plot).exists()


def test_growth_in_the_readme_is_that_of_the_run_beside_it() -> None:
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    run = json.loads((ROOT / "bench" / "results" / "bench.json").read_text(encoding="utf-8"))
    figures = {section["section"]: section["figures"] for section in run["models"]["small"]}
    rates = [median(arms["whole"][OURS]) for arms in figures["throughput"].values()]
    assert " | ".join(f"{rate:,.0f}" for rate in rates) in text
    assert " | ".join(f"{rate / rates[0]:.1f}" for rate in rates) in text
    for kind, digits in (("ttft_s", 0), ("gap_s", 1)):
        times = [1000 * median(own[kind][OURS]) for own in figures["context"].values()]
        assert " | ".join(f"{time:,.{digits}f}" for time in times) in text
    for kind in ("cold", "warm", "8"):
        both = [1000 * median(figures["prefix"][arm][kind]) for arm in (OURS, "mlx_lm.server")]
        assert " | ".join(f"{time:,.0f} ms" for time in both) in text


def test_the_header_names_openblas_kernels_and_warns_of_its_oldest():
    assert report.kernels(None) == "kernels unknown"
    assert report.kernels("SkylakeX") == "kernels for SkylakeX"
    assert "OPENBLAS_CORETYPE" in report.kernels("Prescott")
    assert "kernels" in report.header()["BLAS"]
