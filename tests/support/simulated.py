"""A simulated device: virtual time and a queue like Metal's, under the real engine.

MLX blocks the host while more than ten command buffers are not completed, and a pass over a model
is one buffer a layer or more. What a pass takes is arithmetic over a machine (bandwidth, compute)
and a model (weights, layers, bytes of a token). The engine, the scheduler and the chunk budget are
the real ones; only the runner's device and the clock are not.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

from fakes import SilentObserver

from mlxlite.engine.engine import Engine, EngineOptions
from mlxlite.engine.memory import Memory
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import Prompt, Sequence
from mlxlite.engine.step import Command, Finished, Outcome, Prefilled, Step, Token
from mlxlite.prefix_cache.operations import Stored
from mlxlite.runner.timing import Launch, StepClock

MAX_BUFFERS = 10  # mlx/transforms.cpp: MAX_ACTIVE_TASKS
TILE = 32  # rows of a matrix product's tile: fewer tokens cost as many


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes and half-precision operations a second that a matrix product reaches."""

    name: str
    bandwidth: float
    compute: float
    encode_s: float = 40e-6  # of a command buffer, on the host


@dataclass(frozen=True, slots=True)
class SimModel:
    """`active` parameters are used for a token, of `total`; half a byte and a bit each."""

    name: str
    total: float
    active: float
    num_layers: int
    token_bytes: int  # of keys and values
    width: int

    def read_bytes(self, num_tokens: int) -> float:
        """Bytes of weights that a pass reads: of experts, those that its tokens choose."""
        return 0.56 * min(self.total, self.active * num_tokens)


MACHINES = (
    Machine("M2 8 GB", 80e9, 2.8e12),
    Machine("M4 Pro", 230e9, 7.5e12),
    Machine("M4 Max", 460e9, 14e12),
    Machine("M3 Ultra", 700e9, 24e12),
)
MODELS = (
    SimModel("4B", 4e9, 4e9, 36, 147_456, 2560),
    SimModel("8B", 8e9, 8e9, 36, 147_456, 4096),
    SimModel("30B-A3B", 30e9, 3e9, 48, 98_304, 2048),
    SimModel("70B", 70e9, 70e9, 80, 327_680, 8192),
)


@dataclass
class Clock:
    now: float = 0.0


@dataclass
class Device:
    """A queue of command buffers, each with the time at which it will be completed."""

    clock: Clock
    encode_s: float
    _ends: deque[float] = field(default_factory=deque)
    _free_at: float = 0.0

    def enqueue(self, seconds: float, num_buffers: int) -> None:
        """Launch a pass; moves the clock while the queue is full."""
        for _ in range(num_buffers):
            self.clock.now += self.encode_s
            self._free_at = max(self._free_at, self.clock.now) + seconds / num_buffers
            self._ends.append(self._free_at)
            while len(self._ends) > MAX_BUFFERS:
                self.clock.now = max(self.clock.now, self._ends.popleft())

    def wait(self, end: float) -> None:
        self.clock.now = max(self.clock.now, end)
        while self._ends and self._ends[0] <= self.clock.now:
            self._ends.popleft()

    @property
    def end(self) -> float:
        """When all that is enqueued will be completed."""
        return self._free_at


@dataclass
class _InFlight:
    step: Step
    launch: Launch
    end: float


class SimRunner:
    """Implements `engine.step.Runner` without a model: the times of its passes alone."""

    def __init__(self, machine: Machine, model: SimModel, clock: Clock) -> None:
        self.machine, self.model, self.clock = machine, model, clock
        self.memory = Memory(None, 0, ((model.token_bytes, None),))
        self.device = Device(clock, machine.encode_s)
        self.times = StepClock()
        self.lengths: dict[int, int] = {}  # of the caches, by sequence

    def prefill_s(self, num_tokens: int, start: int) -> float:
        """A chunk's pass: whole tiles, and attention to all tokens before."""
        model, tiled = self.model, -(-num_tokens // TILE) * TILE
        products = 2 * model.active * tiled
        attention = 4 * num_tokens * (start + num_tokens / 2) * model.width * model.num_layers
        return max(
            (products + attention) / self.machine.compute,
            model.read_bytes(tiled) / self.machine.bandwidth,
        )

    def decode_s(self, lengths: SequenceOf[int]) -> float:
        """A pass over rows, which are padded to the longest."""
        held = len(lengths) * max(lengths) * self.model.token_bytes
        return (self.model.read_bytes(len(lengths)) + held) / self.machine.bandwidth

    def advance(
        self, step: Step | None, in_flight: _InFlight | None
    ) -> tuple[_InFlight | None, Outcome | None]:
        launched = self._launch(step) if step else None
        if in_flight is None:
            return launched, None
        began_at = self.clock.now
        self.device.wait(in_flight.end)
        following = launched.launch if launched else None
        device_s = self.times.device_s(in_flight.launch, following, began_at, self.clock.now)
        tokens = tuple(1 for _ in in_flight.step.rows)
        return launched, Outcome(tokens, device_s=device_s, wait_s=self.clock.now - began_at)

    def _launch(self, step: Step) -> _InFlight:
        began_at = self.clock.now
        firsts = [chunk for chunk in step.chunks if chunk.start == 0]
        if firsts:  # packed: one pass, padded to the longest
            longest = max(chunk.stop for chunk in firsts)
            seconds = self.prefill_s(longest * len(firsts), 0)
            self.device.enqueue(seconds, self.model.num_layers)
        for chunk in step.chunks:
            if chunk.start:
                seconds = self.prefill_s(chunk.stop - chunk.start, chunk.start)
                self.device.enqueue(seconds, self.model.num_layers)
            self.lengths[chunk.id] = chunk.stop
        if step.rows:
            lengths = [self.lengths.setdefault(id, 1) for id in step.rows]
            self.device.enqueue(self.decode_s(lengths), self.model.num_layers)
            for id in step.rows:
                self.lengths[id] += 1
        launch = Launch(began_at, self.clock.now - began_at, bool(step.chunks))
        return _InFlight(step, launch, self.device.end)

    def reset(self) -> None:
        self.lengths.clear()

    def embed(self, inputs: Any, *, is_mean: bool, part: Any = None) -> list[list[float]]:
        raise NotImplementedError

    def drop_embedding(self, id: int) -> None: ...

    def files(self, on_event: Callable[[Command], None]) -> SequenceOf[tuple[int, Stored]]:
        return ()


class SimThread:
    """Runs a call after the loop's next turn: the engine publishes before it, as with a thread."""

    def __init__(self, after: Callable[[], None]) -> None:
        self.num_pending = 0
        self._after = after

    def submit(self, call: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        self.num_pending += 1

        def work() -> None:
            self.num_pending -= 1
            result = call(*args)
            self._after()
            if not future.done():  # or its task was cancelled
                future.set_result(result)

        asyncio.get_running_loop().call_soon(work)
        return future

    async def run(self, call: Callable[..., Any], *args: Any) -> Any:
        return await self.submit(call, *args)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, in seconds, its prompt and its answer in tokens."""

    at: float
    num_prompt: int
    num_output: int


@dataclass
class Stream:
    """A stream's tokens, by time. A gap is between two of them."""

    arrival: Arrival
    clock: Clock
    times: list[float] = field(default_factory=list)
    is_over: bool = False

    def __call__(self, output: Token | Prefilled | Finished) -> None:
        if isinstance(output, Token):
            self.times.append(self.clock.now)
        self.is_over = self.is_over or isinstance(output, Finished)

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Result:
    """`streams` in the order of arrival; `steps` are (time, rows, prompt tokens)."""

    streams: list[Stream]
    runner: SimRunner

    @property
    def worst_gap(self) -> float:
        return max((max(stream.gaps, default=0.0) for stream in self.streams), default=0.0)

    def bound(self, budget_s: float) -> float:
        """1.5 of the budget, or of the least chunk where that takes longer, beside a decode."""
        longest = max(s.arrival.num_prompt + s.arrival.num_output for s in self.streams)
        least = self.runner.prefill_s(TILE, longest)
        return 1.5 * max(budget_s, least) + self.runner.decode_s([longest] * 8)


def simulate(
    machine: Machine, model: SimModel, arrivals: Iterable[Arrival], budget_s: float = 0.1
) -> Result:
    """Serve the arrivals to their ends on the real engine."""
    return asyncio.run(_simulate(machine, model, sorted(arrivals, key=lambda a: a.at), budget_s))


async def _simulate(
    machine: Machine, model: SimModel, arrivals: list[Arrival], budget_s: float
) -> Result:
    clock = Clock()
    runner = SimRunner(machine, model, clock)
    streams: list[Stream] = []
    waiting = deque(arrivals)

    def arrive() -> None:
        while waiting and waiting[0].at <= clock.now:
            arrival = waiting.popleft()
            stream = Stream(arrival, clock)
            number = len(streams) + 1
            prompt = Prompt(tuple((number * 7919 + i) % 50_000 for i in range(arrival.num_prompt)))
            sampling = SamplingParams(temperature=0.0)
            sequence = Sequence(number, prompt, sampling, arrival.num_output)
            streams.append(stream)
            engine.add([sequence], [stream])

    thread: Any = SimThread(arrive)
    options = EngineOptions(max_queue=10_000, prefill_budget_s=budget_s)
    sim: Any = runner
    engine = Engine(
        Scheduler(Policy(memory=runner.memory)),
        sim,
        device_thread=thread,
        observer=SilentObserver(),
        options=options,
    )
    task = asyncio.get_running_loop().create_task(engine.run())
    num_idle = 0
    while waiting or not all(stream.is_over for stream in streams):
        await asyncio.sleep(0)
        assert not task.done(), task.exception()
        num_idle = 0 if thread.num_pending else num_idle + 1
        if num_idle > 20:  # nothing runs: the time passes until the next arrival
            assert waiting, "the engine has stopped"
            clock.now = max(clock.now, waiting[0].at)
            arrive()
            num_idle = 0
    task.cancel()
    return Result(streams, runner)
