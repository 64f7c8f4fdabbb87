"""The benchmark's arithmetic: figures of traces, ratios and verdicts, loads, plots, the README."""

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import compare, plots, readme, report, scenarios
from bench.__main__ import parse
from bench.arrivals import at, percentiles
from bench.compare import Comparison, Verdict, at_least, at_most
from bench.costs import Sample, stopped_s
from bench.models import Writer, save_endless
from bench.peers import OURS, PEERS
from bench.plan import Feed, Plan, Request, Stream, Trace
from bench.svg import Kind, Plot, Series, ticks

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
    assert Trace.from_json(json.loads(json.dumps([own.as_json()]))).streams == (own,)


def test_a_plan_tells_the_load_generator_all_that_a_request_wants() -> None:
    asked = Request("hi", (1,), 5, is_streamed=False, at_s=2.0, leave_after_s=3.0)
    given = Plan([[asked]]).as_json()["first"][0][0]
    assert (given["at_s"], given["leave_after_s"], given["leave_after_tokens"]) == (2.0, 3.0, None)
    assert given["body"]["stream"] is False
    assert "stream_options" not in given["body"]


def test_an_arm_without_http_refuses_a_request_that_needs_it() -> None:
    with pytest.raises(AssertionError, match="load generator"):
        Feed(Plan([[Request("hi", (1,), 5, at_s=1.0)]]))


# --- loads ------------------------------------------------------------------------------------


def test_arrivals_are_the_same_for_the_same_seed_and_come_at_the_rate() -> None:
    first = list(scenarios.arrivals(4000, 10.0, seed=3))
    assert first == list(scenarios.arrivals(4000, 10.0, seed=3))
    assert first != list(scenarios.arrivals(4000, 10.0, seed=4))
    assert first == sorted(first)
    assert math.isclose(4000 / first[-1], 10.0, rel_tol=0.1)


def test_an_open_loop_is_clients_who_ask_once_each_at_its_time(writer: Writer) -> None:
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


def test_a_conversation_goes_on_after_its_first_turn(writer: Writer) -> None:
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


def test_a_machine_is_quiet_if_nobody_else_ran_before_or_beside() -> None:
    assert report.quiet(before=0.3, after=3.0, num_cores=2) == "yes"
    assert report.quiet(before=0.9, after=3.0, num_cores=2).startswith("no: 0.9")
    assert report.quiet(before=0.3, after=5.0, num_cores=2).startswith("no: 5.0")


def test_a_comparison_survives_json() -> None:
    for asked in (None, at_most(0.8)):
        own = comparison([1.0, 2.0], [3.0, 4.0], asked)
        assert Comparison.from_json(json.loads(json.dumps(own.as_json()))) == own


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


def test_every_peer_is_told_the_model_the_port_and_the_rows() -> None:
    for peer in PEERS:
        arguments = peer.arguments(Path("/models/m"), 4321, 8)
        assert {"/models/m", "4321", "8"} <= set(arguments), peer.name


def test_a_peer_that_is_not_installed_has_no_command() -> None:
    peer = type(PEERS[0])("none", lambda path, port, rows: ["there-is-no-such-program"])
    assert not peer.is_installed


def test_the_command_line_refuses_a_section_or_a_peer_that_there_is_not() -> None:
    assert parse(["--only", "burst,lost", "--peers", "mlx-vlm"]).only == "burst,lost"
    for flags in (["--only", "nosuch"], ["--peers", "nosuch"]):
        with pytest.raises(SystemExit):
            parse(flags)


# --- plots and the README ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0, 0.9, [0, 0.2, 0.4, 0.6, 0.8]), (-0.3, 1, [0, 0.5, 1])],
)
def test_ticks_are_round_numbers_in_the_range(
    low: float, high: float, expected: list[float]
) -> None:
    assert ticks(low, high) == expected


@pytest.mark.parametrize("kind", Kind)
def test_a_plot_is_well_formed_and_inside_its_frame(kind: Kind) -> None:
    series = [Series("a & b", [(0, 1.0), (1, 30.0)], kind), Series("c", [(0, 2.0), (1, 3.0)], kind)]
    names = ("cold", "warm") if kind is Kind.BARS else ()
    svg = Plot("<title>", "x", "y", series, x_names=names, marks=[(0.5, "here")]).as_svg()
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    numbers = re.findall(r'(cx|x|cy|y)="(-?[\d.]+)"', svg)
    assert all(0 <= float(n) <= (width if "x" in axis else height) for axis, n in numbers)
    assert "a &amp; b" in svg


def run_of(*sections: dict[str, object]) -> dict[str, object]:
    return {"header": {"date": "today"}, "models": {"small": list(sections)}}


THROUGHPUT = {
    "section": "throughput",
    "figures": {f"C={c}": {"whole": {OURS: [2.0 * c], "mlx_lm.server": [1.0 * c]}} for c in (1, 8)},
    "comparisons": [comparison([2.0, 2.1], [1.0, 1.0], at_least(1.25)).as_json()],
}


def test_a_run_is_drawn_from_its_json_alone_and_only_what_was_measured() -> None:
    assert plots.draw(run_of()) == {}
    files = plots.draw(json.loads(json.dumps(run_of(THROUGHPUT))))
    assert list(files) == ["small-throughput.svg"]
    assert files["small-throughput.svg"].count("<polyline") == 2


def test_the_readmes_block_has_the_ratios_and_the_plots_of_the_run() -> None:
    block = readme.block(run_of(THROUGHPUT), "docs/bench")
    assert "| 2.05 (2.00–2.10) | ≥ 1.25 | yes |" in block
    assert "](docs/bench/small-throughput.svg)" in block


def test_a_run_that_was_made_again_is_shown_beside_the_first() -> None:
    def run(ours: list[float]) -> dict[str, object]:
        comparisons = [comparison(ours, [1.0, 1.0], at_least(1.25)).as_json()]
        return run_of({"section": "burst", "figures": {}, "comparisons": comparisons})

    def row(first: list[float], second: list[float]) -> str:
        return readme.agreement(run(first), run(second)).splitlines()[-1]

    assert row([2.0, 2.0], [2.1, 2.2]).endswith("| +8% | yes |")
    assert row([2.0, 2.6], [2.5, 4.0]).endswith("| +41% | yes |"), "the ranges meet"
    assert row([2.0, 2.1], [2.6, 2.7]).endswith("| +29% | no |")
    assert "0 of 1 ratios agree" in readme.agreement(run([2.0, 2.1]), run([2.6, 2.7]))


def test_only_what_is_between_the_markers_is_rewritten() -> None:
    before = "a\n<!-- growth -->\nold\n<!-- /growth -->\nb"
    after = "a\n<!-- growth -->\nnew\n<!-- /growth -->\nb"
    assert readme.rewritten(before, readme.GROWTH, "new") == after
    with pytest.raises(ValueError, match="bench"):
        readme.rewritten(before, readme.FIGURES, "new")


def test_growth_is_told_against_the_least() -> None:
    def both(ours: float, theirs: float) -> dict[str, list[float]]:
        return {"server": [ours], "mlx_lm.server": [theirs]}

    table = readme.growth(
        run_of(
            {
                "section": "throughput",
                "figures": {f"C={n}": {"whole": both(r, 1)} for n, r in ((1, 200.0), (8, 1000.0))},
            },
            {
                "section": "context",
                "figures": {
                    "256": {"ttft_s": both(0.1, 1), "gap_s": both(0.005, 1)},
                    "1024": {"ttft_s": both(0.8, 1), "gap_s": both(0.006, 1)},
                },
            },
            {
                "section": "prefix",
                "figures": {s: {"cold": [2.0], "warm": [0.1], "8": [2.5]} for s in both(1, 1)},
            },
        )
    )
    assert "| times one client's | 1.0 | 5.0 |" in table
    assert "| for each of them | 1.00 | 0.62 |" in table
    assert "| times as long | 1.0 | 8.0 |" in table
    assert "| another one after it | 100 ms | 100 ms |" in table


def test_the_figures_in_the_readme_are_those_of_the_run_beside_it() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = next(
        line for line in text.splitlines() if line.startswith("python -m bench --readme")
    )
    runs = [ROOT / path for path in command.split()[4:]]
    for name, made in readme.texts_of(runs, ROOT).items():
        assert readme.rewritten(text, name, made) == text
    for plot in re.findall(r"\]\((docs/bench/\S+\.svg)\)", text):
        assert (ROOT / plot).exists()


def test_the_header_says_where_openblas_computes_with_its_oldest_kernels():
    assert report.kernels(None) == "kernels unknown"
    assert report.kernels("SkylakeX") == "kernels for SkylakeX"
    assert "OPENBLAS_CORETYPE" in report.kernels("Prescott")
    assert "kernels" in report.header()["BLAS"]
