"""The arms without HTTP: mlx-lm's own generators, our loop, our engine.

All of them run on the same lane, one after the other, as the server does: mlx-lm's calls are made
from the lane's thread, so that no arm pays for another thread's streams. They have the network as
mlx-lm loads it; on a CPU that is another copy, because our runner lays the weights out anew.
Nothing here may be running while another process is measured.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from mlx_lm.utils import load_model

from bench.plan import Feed, Plan, Request, Trace
from mlxlite.config.options import Config
from mlxlite.engine.device_thread import Lane
from mlxlite.engine.engine import Engine
from mlxlite.engine.memory import Memory
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import FinishReason, Sequence
from mlxlite.engine.sequence import Prompt as PromptTokens
from mlxlite.engine.step import Add, Command, Finish, Finished, Launched, Outcome, Step, Token
from mlxlite.metrics import Metrics
from mlxlite.models.load import LoadedModel, load
from mlxlite.output.events import Event
from mlxlite.output.generation import Generation
from mlxlite.prefix_cache.operations import Stored
from mlxlite.runner.model_runner import ModelRunner

MAX_ROWS = 16


@dataclass(slots=True)
class StepTimes:
    """One tick of the engine, in seconds; `device_s` and `advance_s` are the runner's."""

    num_rows: int
    num_prefill_tokens: int
    schedule_s: float
    lane_s: float
    deliver_s: float
    advance_s: float = 0.0
    device_s: float = 0.0


class TimedRunner:
    """A runner that notes how long each step had the device, and the whole call."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.times: list[tuple[float, float]] = []  # (advance_s, device_s) of completed steps

    @property
    def memory(self) -> Memory:
        return self._runner.memory

    @property
    def is_slow_to_launch(self) -> bool:
        return self._runner.is_slow_to_launch

    def advance(
        self, step: Step | None, in_flight: Launched | None
    ) -> tuple[Launched | None, Outcome | None]:
        begun_at = perf_counter()
        launched, outcome = self._runner.advance(step, in_flight)
        if outcome is not None:
            self.times.append((perf_counter() - begun_at, outcome.device_s))
        return launched, outcome

    def reset(self) -> None:
        self._runner.reset()

    def files(self, tell: Callable[[Command], None]) -> list[tuple[int, Stored]]:
        return []


class StepLog(Metrics):
    """The server's metrics, which the engine pays for in life, and each step's times."""

    def __init__(self, runner: TimedRunner) -> None:
        super().__init__(model_name="bench", version="", start_time_s=0.0)
        self._runner = runner
        self.steps: list[StepTimes] = []

    def step(
        self,
        num_rows: int,
        num_prefill_tokens: int,
        schedule_s: float,
        lane_s: float,
        deliver_s: float,
    ) -> None:
        super().step(num_rows, num_prefill_tokens, schedule_s, lane_s, deliver_s)
        times = self._runner.times[-1]
        self.steps.append(
            StepTimes(num_rows, num_prefill_tokens, schedule_s, lane_s, deliver_s, *times)
        )


class InProcess:
    """A loaded model, and the arms over it. Make it with `open`."""

    def __init__(
        self, lane: Lane, model: LoadedModel, network: Any, runners: tuple[ModelRunner, ModelRunner]
    ) -> None:
        self._lane = lane
        self.model = model
        self._network = network
        self._runner = runners[0]
        timed = TimedRunner(runners[1])
        self.log = StepLog(timed)
        self._engine = Engine(
            Scheduler(Policy(max_rows=MAX_ROWS)),
            timed,
            lane=lane,
            observer=self.log,
        )
        self._num_sequences = 0
        self._task = asyncio.get_running_loop().create_task(self._engine.run())

    @classmethod
    async def open(cls, lane: Lane, path: Path) -> "InProcess":
        """Raises mlxlite.sequence.LoadError."""

        def make() -> tuple[LoadedModel, Any, tuple[ModelRunner, ModelRunner]]:
            network, model = load(Config(model=str(path)))
            runners = ModelRunner(network), ModelRunner(network)
            runners[1].warm_up()
            if runners[0].is_slow_to_launch:
                network = load_model(path)[0]
            return model, network, runners

        return cls(lane, *await lane.run(make))

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def render(self, text: str) -> tuple[int, ...]:
        messages = [{"role": "user", "content": text}]
        return self.model.render(messages, {}, is_continuation=False).tokens

    async def generate_step(self, plan: Plan) -> Trace:
        """mlx-lm, one sequence at a time: tokens only."""
        return await self._lane.run(_one_by_one, self._tokens_alone, plan)

    async def stream_generate(self, plan: Plan) -> Trace:
        """mlx-lm, one sequence at a time, with its text."""
        return await self._lane.run(_one_by_one, self._text_alone, plan)

    def _tokens_alone(self, request: Request) -> Any:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        prompt = mx.array(request.tokens)
        return generate_step(prompt, self._network, max_tokens=request.max_tokens)

    def _text_alone(self, request: Request) -> Any:
        from mlx_lm import stream_generate

        return stream_generate(
            self._network,
            self.model.tokenizer.wrapper,
            list(request.tokens),
            max_tokens=request.max_tokens,
        )

    async def batch_generator(self, plan: Plan) -> Trace:
        """mlx-lm's continuous batching: the upper bound that the others are divided by."""
        return await self._lane.run(_batch_generator, self._network, plan)

    async def loop(self, plan: Plan) -> Trace:
        """Our scheduler and runner in a plain loop: no asyncio, no text, no other thread."""
        return await self._lane.run(_loop, self._runner, plan)

    async def engine(self, plan: Plan) -> Trace:
        """Our engine: the same, with the hop to the lane, with text, into a sink in memory."""
        feed = Feed(plan)
        over = asyncio.Event()
        first_id = self._num_sequences + 1

        def ask() -> None:
            for id, request in feed.due(perf_counter()):
                sequence = _sequence(first_id + id, request)
                self._num_sequences = first_id + id
                write = partial(take, id)
                finish = partial(self._engine.finish, sequence.id)
                generation = Generation(
                    sequence, detokenize=self.model.detokenize, write=write, finish=finish
                )
                self._engine.add([sequence], [generation])

        def take(id: int, event: Event) -> None:
            now = perf_counter()
            usage = event.usage
            assert usage is not None
            for _ in range(usage.num_output - feed.streams[id].num_tokens):
                feed.token(id, now)
            ask()
            if feed.is_over:
                for open_id in feed.open:
                    self._engine.cancel(first_id + open_id)
                feed.open.clear()
                if not self._engine.num_live:
                    over.set()

        ask()
        await over.wait()
        await asyncio.sleep(0.01)  # the step that only releases belongs to this run
        return feed.trace()


def _sequence(id: int, request: Request) -> Sequence:
    greedy = SamplingParams(temperature=0.0)
    prompt = PromptTokens(request.tokens)
    return Sequence(id, prompt, greedy, request.max_tokens, wants_usage=True)


def _one_by_one(generate: Callable[[Request], Any], plan: Plan) -> Trace:
    feed = Feed(plan)
    while not feed.is_over:
        for id, request in feed.due(perf_counter()):
            for _ in generate(request):
                feed.token(id, perf_counter())
    return feed.trace()


def _batch_generator(network: Any, plan: Plan) -> Trace:
    from mlx_lm.generate import BatchGenerator

    num_rows = len(plan.first) + len(plan.then)
    generator = BatchGenerator(network, completion_batch_size=num_rows, prefill_batch_size=num_rows)
    feed = Feed(plan)
    ids: dict[int, int] = {}
    while not feed.is_over:
        for id, request in feed.due(perf_counter()):
            uids = generator.insert([list(request.tokens)], [request.max_tokens])
            ids[uids[0]] = id
        _, responses = generator.next()
        now = perf_counter()
        for response in responses:
            feed.token(ids[response.uid], now)
    generator.close()
    return feed.trace()


def _loop(runner: ModelRunner, plan: Plan) -> Trace:
    scheduler = Scheduler(Policy(max_rows=MAX_ROWS))
    feed = Feed(plan)
    in_flight: Launched | None = None
    while True:
        commands: list[Command] = [
            Add(_sequence(id, request)) for id, request in feed.due(perf_counter())
        ]
        if feed.is_over:
            commands += [Finish(id, FinishReason.CANCELLED) for id in feed.open]
            feed.open.clear()
        for command in commands:
            scheduler.apply(command)
        step = scheduler.schedule()
        if step is None and in_flight is None:
            return feed.trace()
        launched, outcome = runner.advance(step, in_flight)
        now = perf_counter()
        if in_flight is not None and outcome is not None:
            for event in scheduler.complete(in_flight.step, outcome):
                match event:
                    case Token(id):
                        feed.token(id, now)
                    case Finished(id, FinishReason.ERROR, error):
                        raise RuntimeError(f"sequence {id} failed: {error}")
        in_flight = launched
