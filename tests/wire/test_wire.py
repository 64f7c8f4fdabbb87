"""A record of the wire: some 400 requests to servers in processes of their own, and their answers.

What a server answers is compared with what is recorded in `records/`: status, header fields, body,
the frames of a stream. Nothing here imports any module of mlxlite: it holds for whatever is inside.
Requests are sent one at a time, in the order of the cases, because an answer states how much of its
prompt was cached. How answers become comparable is in `record`.

An answer that changes on purpose is recorded anew, and the difference is for review:

    MLXLITE_RECORD=1 python -m pytest tests/wire
    git diff tests/wire/records
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from wire import on_app, on_bare, on_demo, on_parrots, record
from wire.cases import Step
from wire.client import Raw, running
from wire.models import save_models

pytest.importorskip("llguidance", reason="structured output is the extra `grammar`")

IS_RECORDING = bool(os.environ.get("MLXLITE_RECORD"))
SERVERS: Mapping[str, tuple[Sequence[str], Sequence[Step]]] = {
    "demo": ((), on_demo.CASES),
    "app": (on_app.FLAGS, on_app.CASES),
    "parrot": (on_parrots.FLAGS, on_parrots.PARROT),
    "harmony": (on_parrots.HARMONY_FLAGS, on_parrots.HARMONY),
    "bare": (on_bare.FLAGS, on_bare.CASES),
}


def entries_of(flags: Sequence[str], steps: Sequence[Step]) -> dict[str, Any]:
    """What a server with these flags answers, by the names of the cases."""
    answers: dict[str, Raw] = {}
    with running(*flags) as port:
        for step in steps:
            for name, raw in step.run(port, answers):
                assert name not in answers, f"two cases are called {name!r}"
                answers[name] = raw
    return {name: record.entry_of(raw) for name, raw in answers.items()}


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All answers of all servers, two of which run at a time."""
    models = save_models(tmp_path_factory.mktemp("parrots"))

    def play(server: str) -> dict[str, Any]:
        flags, steps = SERVERS[server]
        model = ("--model", str(models[server])) if server in models else ()
        return entries_of((*model, *flags), steps)

    with ThreadPoolExecutor(2) as pool:
        entries = dict(zip(SERVERS, pool.map(play, SERVERS), strict=True))
    if IS_RECORDING:
        for server, answers in entries.items():
            record.save(server, answers)
    return entries


def recorded() -> list[Any]:
    """A server's name and a case's, for all that are recorded."""
    return [
        pytest.param(server, name, id=f"{server}: {name}")
        for server in SERVERS
        for name in record.load(server)
    ]


@pytest.mark.parametrize("server", SERVERS)
def test_each_case_is_recorded_and_each_record_has_its_case(
    server: str, found: dict[str, dict[str, Any]]
) -> None:
    assert list(found[server]) == list(record.load(server))


@pytest.mark.parametrize(("server", "name"), recorded())
def test_the_answer_is_the_recorded_one(
    server: str, name: str, found: dict[str, dict[str, Any]]
) -> None:
    now = found[server].get(name)
    difference = record.difference(record.load(server).get(name), now)
    assert not difference, f"{server}: {name}\n{difference}"
