"""Gaps of running streams on a simulated device with a queue like Metal's, for four machines.

The bound is 1.5 of the prefill budget beside a decode; where the least chunk, a tile, takes longer
than the budget, 1.5 of that.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import MACHINES, MODELS, Arrival, Device, Machine, SimModel, simulate
from simulated import Clock as SimClock

BUDGET_S = 0.1
FITS = {"M2 8 GB": 6e9, "M4 Pro": 40e9, "M4 Max": 100e9, "M3 Ultra": 400e9}
PAIRS = [
    pytest.param(machine, model, id=f"{machine.name}-{model.name}")
    for machine in MACHINES
    for model in MODELS
    if model.read_bytes(10**6) < FITS[machine.name]
]
MIXES = {
    "long prompts among short": [
        *(Arrival(0.3 * i, 300, 80) for i in range(30)),
        *(Arrival(3.0, 6000, 50), Arrival(8.0, 4000, 50)),
    ],
    "a stream and a very long prompt": [Arrival(0.0, 50, 400), Arrival(1.0, 30_000, 10)],
    "a burst": [Arrival(0.0, 100, 200), *(Arrival(2.0, 800, 60) for _ in range(16))],
    "many short prompts": [Arrival(0.15 * i, 150, 60) for i in range(60)],
}
arrivals_st = st.lists(
    st.builds(Arrival, st.floats(0, 20), st.integers(1, 9000), st.integers(1, 120)),
    min_size=2,
    max_size=12,
)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("machine", "model"), PAIRS)
def test_a_running_stream_waits_no_longer_than_the_budget_allows(
    machine: Machine, model: SimModel, mix: str
) -> None:
    result = simulate(machine, model, MIXES[mix], BUDGET_S)
    assert 0.0 < result.worst_gap <= result.bound(BUDGET_S)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(arrivals=arrivals_st, pair=st.sampled_from([pair.values for pair in PAIRS]))
def test_in_any_mix_of_arrivals_the_gaps_keep_to_the_bound(
    arrivals: list[Arrival], pair: tuple[Machine, SimModel]
) -> None:
    result = simulate(*pair, arrivals, BUDGET_S)
    assert all(len(stream.times) == stream.arrival.num_output for stream in result.streams)
    assert result.worst_gap <= result.bound(BUDGET_S)


def test_the_queue_blocks_the_host_beyond_its_buffers() -> None:
    clock = SimClock()
    device = Device(clock, encode_s=0.0)
    device.enqueue(1.0, 10)
    assert clock.now == 0.0
    device.enqueue(1.0, 10)
    assert clock.now == pytest.approx(1.0)
    device.wait(device.end)
    assert clock.now == pytest.approx(2.0)
