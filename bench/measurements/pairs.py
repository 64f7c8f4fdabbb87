"""Interleaved runs of several arms on the same plans, and our figures beside the others'."""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from bench.compare import Asked, Comparison
from bench.inprocess import InProcess
from bench.models import Writer
from bench.peers import MLX_LM, OURS, PLAIN, US, Peer, all_started
from bench.plan import Plan, Request, Trace
from bench.report import Table
from bench.serving import Served

T = TypeVar("T")
Arm = Callable[[Plan], Awaitable[Trace]]
Traces = dict[str, list[Trace]]  # by arm, one a pair
NUM_ROWS = 8  # except where throughput by concurrency is measured


@dataclass(frozen=True, slots=True)
class Figure:
    """What is read from the traces of one kind of plan, and the bound of its ratio."""

    what: str
    unit: str  # as a Comparison's
    read: Callable[[Trace], float]
    kind: str = ""  # of the plan
    asked: Asked | None = None


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    models: Sequence[str]
    sections: Sequence[str]
    num_pairs: int
    max_tokens: int
    num_rounds: int  # requests of each client, one after the other
    has_parts: bool  # also parts of ours and of mlx-lm, without a server


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured."""

    path: Path
    inprocess: InProcess
    writer: Writer
    peers: Sequence[Peer]
    scale: Scale
    is_small: bool  # the bounds for small models hold
    failures: dict[str, str] = field(default_factory=dict)  # of peers that are not required

    def clients(self, num_clients: int) -> list[list[Request]]:
        return self.writer.clients(num_clients, self.scale.max_tokens, self.scale.num_rounds)

    def servers(
        self, num_rows: int, *others: Peer, **more: Any
    ) -> AbstractAsyncContextManager[dict[str, Served]]:
        """Ours, others and the peers, with equal numbers of rows."""
        able = [peer for peer in self.peers if peer.name not in self.failures]
        return all_started([US, *others, *able], self.path, num_rows, **more)

    async def one_pair(self, arms: Mapping[str, Arm], plan: Plan) -> dict[str, Trace]:
        """Every arm on one plan, in turn, except those that have failed."""
        traces: dict[str, Trace] = {}
        for name, arm in arms.items():
            if name not in self.failures:
                with self.excused(name):
                    traces[name] = (await arm(plan)).checked()
        return traces

    @contextmanager
    def excused(self, name: str) -> Iterator[None]:
        """A peer that fails here is left out from now on; ours and mlx-lm's must not fail."""
        try:
            yield
        except RuntimeError as error:
            if name == MLX_LM or name not in {peer.name for peer in self.peers}:
                raise
            self.failures[name] = str(error)

    async def rounds(
        self,
        arms: Mapping[str, Arm],
        plans: Callable[[int], Mapping[str, Plan]],
        has_warm_up: bool = True,
    ) -> dict[str, Traces]:
        """Every arm in turn on each of a pair's plans: traces by the plan's name.

        `plans` gets the pair's number from 0; the warm-up pair is -1 and is not counted.
        """
        traces: dict[str, Traces] = {}
        for pair in range(-1 if has_warm_up else 0, self.scale.num_pairs):
            for kind, plan in plans(pair).items():
                for name, trace in (await self.one_pair(arms, plan)).items():
                    own = traces.setdefault(kind, {}).setdefault(name, [])
                    own += [trace] if pair >= 0 else []
        return {
            kind: {name: own for name, own in by_name.items() if name not in self.failures}
            for kind, by_name in traces.items()
        }

    async def paired(
        self, arms: Mapping[str, Arm], make: Callable[[], Plan], has_warm_up: bool = True
    ) -> Traces:
        """Every arm in turn on one plan a pair."""
        return (await self.rounds(arms, lambda _: {"": make()}, has_warm_up))[""]

    def table(
        self,
        title: str,
        traces: Mapping[str, Traces],
        figures: Sequence[Figure],
        *notes: str,
        **more: Any,
    ) -> Table:
        """The figures by their names and arms, and ours beside every other arm's."""
        read: dict[str, Any] = {}
        comparisons: list[Comparison] = []
        for figure in figures:
            values = read[figure.what] = each(traces[figure.kind], figure.read)
            comparisons += self.against(figure.what, figure.unit, values, figure.asked)
        return Table(title, figures=read, notes=notes, comparisons=comparisons, **more)

    def asked(self, asked: Asked) -> Asked | None:
        return asked if self.is_small else None

    def against(
        self,
        what: str,
        unit: str,
        figures: Mapping[str, Sequence[float]],
        asked: Asked | None = None,
    ) -> list[Comparison]:
        """Our figures beside every other arm's; `asked` holds for mlx_lm.server's."""
        ours = figures[OURS]
        return [
            Comparison(what, unit, ours, own, name, asked if name == MLX_LM else None)
            for name, own in figures.items()
            if name not in (OURS, PLAIN) and name not in self.failures
        ]

    def on_equal_kernels(
        self, what: str, unit: str, figures: Mapping[str, Sequence[float]]
    ) -> list[Comparison]:
        """Ours without forms for a CPU beside every other arm."""
        ours = figures.get(PLAIN, figures[OURS])
        comparisons = self.against(what, unit, {**figures, OURS: ours})
        return [replace(comparison, is_equal=True) for comparison in comparisons]


def is_cpu() -> bool:
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def runs(servers: Mapping[str, Served]) -> dict[str, Arm]:
    return {name: served.run for name, served in servers.items()}


def each(traces: Mapping[str, Sequence[Trace]], read: Callable[[Trace], T]) -> dict[str, list[T]]:
    """A figure of each trace, by arm."""
    return {name: [read(trace) for trace in own] for name, own in traces.items()}
