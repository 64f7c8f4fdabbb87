"""The arms without HTTP: mlx-lm's own generators, and our engine.

All of them run on one device thread, one after the other, with one network on mlx-lm's own kernels:
their ratios are ratios of the code around it. Nothing here may run while another process is
measured.
"""

import asyncio
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from mlx_lm import stream_generate
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import load_tokenizer

from bench.plan import Feed, Plan, Trace
from bench.serve_plain import use_plain_kernels
from mlxlite.config.options import Config
from mlxlite.engine.device_thread import DeviceThread
from mlxlite.engine.engine import Engine
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import Prompt, Sequence
from mlxlite.metrics import Metrics
from mlxlite.models.load import LoadedModel, load
from mlxlite.output.events import Event
from mlxlite.output.generation import Generation
from mlxlite.runner.model_runner import ModelRunner

MAX_ROWS = 16


class InProcess:
    """A loaded model, and the arms over it. Make it with `open`."""

    def __init__(
        self, device_thread: DeviceThread, network: Any, model: LoadedModel, runner: ModelRunner
    ) -> None:
        self._device_thread, self._network = device_thread, network
        self.model = model
        scheduler = Scheduler(Policy(max_rows=MAX_ROWS))
        log = Metrics(model_name="bench", version="", start_time_s=0.0)  # a part of its cost
        self._engine = Engine(scheduler, runner, device_thread=device_thread, observer=log)
        self._num_sequences = 0
        self._task = asyncio.get_running_loop().create_task(self._engine.run())

    @classmethod
    async def open(cls, device_thread: DeviceThread, path: Path) -> "InProcess":
        """Raises mlxlite.sequence.LoadError."""

        def make() -> tuple[Any, LoadedModel, ModelRunner]:
            use_plain_kernels()
            network, model = load(Config(model=str(path)))
            runner = ModelRunner(network)
            runner.warm_up()
            return network, model, runner

        return cls(device_thread, *await device_thread.run(make))

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def render(self, text: str) -> tuple[int, ...]:
        messages = [{"role": "user", "content": text}]
        return self.model.render(messages, {}, is_continuation=False).tokens

    async def stream_generate(self, plan: Plan) -> Trace:
        """mlx-lm, one sequence at a time, with its text."""
        own, tokenizer = self._network, load_tokenizer(self.model.path)

        def run() -> Trace:
            feed = Feed(plan)
            while not feed.is_over:
                for id, asked in feed.due(perf_counter()):
                    prompt = list(asked.tokens)
                    for _ in stream_generate(own, tokenizer, prompt, max_tokens=asked.max_tokens):
                        feed.token(id, perf_counter())
            return feed.trace()

        return await self._device_thread.run(run)

    async def batch_generator(self, plan: Plan) -> Trace:
        """mlx-lm's continuous batching: the bound of a server on mlx-lm's kernels."""
        return await self._device_thread.run(_batch_generator, self._network, plan)

    async def engine(self, plan: Plan) -> Trace:
        """Our engine: scheduler, runner and text, without HTTP."""
        feed, over, first_id = Feed(plan), asyncio.Event(), self._num_sequences

        def ask() -> None:
            for id, request in feed.due(perf_counter()):
                self._num_sequences += 1
                prompt, most = Prompt(request.tokens), request.max_tokens
                greedy = SamplingParams(temperature=0)
                sequence = Sequence(first_id + id, prompt, greedy, most, wants_usage=True)
                generation = Generation(
                    sequence,
                    detokenize=self.model.detokenize,
                    write=partial(take, id),
                    finish=partial(self._engine.finish, sequence.id),
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


def _batch_generator(network: Any, plan: Plan) -> Trace:
    num_rows = len(plan.first) + len(plan.then)
    generator = BatchGenerator(network, completion_batch_size=num_rows, prefill_batch_size=num_rows)
    feed = Feed(plan)
    ids: dict[int, int] = {}
    while not feed.is_over:
        for id, request in feed.due(perf_counter()):
            uids = generator.insert([list(request.tokens)], [request.max_tokens])
            ids[uids[0]] = id
        _, responses = generator.next()
        for response in responses:
            feed.token(ids[response.uid], perf_counter())
    generator.close()
    return feed.trace()
