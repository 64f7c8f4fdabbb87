"""Health, models, metrics and cancel; every route with and without `/v1`.

The server runs in this process around a scripted runner, with real sockets. A debugging loop
refuses tasks, transports and errors that are left behind.
"""

from typing import Any

import pytest
from helpers import DONE, ENDLESS, FakeModel, chat_body, in_a_loop, serving

pytestmark = pytest.mark.usefixtures("no_server_thread_is_left")


@pytest.mark.parametrize(
    ("settings", "batching"),
    [
        ({"max_batch_size": 0}, "disabled"),
        ({}, "enabled (max batch: 8, continuous: true)"),
        (
            {"max_batch_size": 4, "enable_continuous_batching": False},
            "enabled (max batch: 4, continuous: false)",
        ),
    ],
)
def test_health_reports_how_it_batches(settings: dict[str, Any], batching: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(**settings) as served, await served.wire() as wire:
            answer = await wire.get("/health")
            assert answer.status == 200
            assert answer.json == {"status": "ok", "batching": batching}

    test()


@in_a_loop
async def test_every_route_is_there_with_and_without_v1() -> None:
    async with serving(FakeModel(id="org/name")) as served, await served.wire() as wire:
        for prefix in ("", "/v1"):
            for path in ("/health", "/metrics", "/models", "/models/org/name", "/cache"):
                assert (await wire.get(prefix + path)).status == 200, path
            assert (await wire.get(f"{prefix}/health?full=1")).status == 200
            assert (await wire.post(f"{prefix}/chat/completions", chat_body("x"))).status == 200
            assert (await wire.post(f"{prefix}/cancel", {})).status == 200


@in_a_loop
async def test_models_lists_the_one_there_is() -> None:
    model = FakeModel(id="org/name", context_size=77)
    async with serving(model) as served, await served.wire() as wire:
        listed = (await wire.get("/v1/models")).json
        (card,) = listed["data"]
        assert listed["object"] == "list"
        assert card["id"] == "org/name"
        assert card["object"] == "model"
        assert card["owned_by"] == "mlx"
        assert isinstance(card["created"], int)
        assert card["max_model_len"] == 77
        assert (await wire.get("/v1/models/org/name")).json == card
        assert (await wire.get("/v1/models/org%2Fname")).json == card
        missing = await wire.get("/v1/models/other")
        assert missing.status == 404
        assert missing.error["code"] == "model_not_found"


@in_a_loop
async def test_metrics_are_prometheus_text_or_the_seeds_json() -> None:
    async with serving(max_batch_size=4) as served, await served.wire() as wire:
        await wire.chat("hello")
        values = (await wire.get("/metrics", accept="application/json")).json
        assert set(values) == {
            "waiting_requests",
            "running_requests",
            "max_batch_size",
            "total_requests_processed",
            "total_batches_processed",
            "avg_batch_size",
            "avg_latency_ms",
            "cache_hit_rate",
            "total_tokens_generated",
        }
        assert values["max_batch_size"] == 4
        assert values["total_requests_processed"] == 1
        assert values["total_tokens_generated"] == 6, "five characters and the end"
        text = await wire.get("/metrics")
        assert text["content-type"].startswith("text/plain; version=0.0.4")
        assert b"vllm:num_requests_running" in text.body


@in_a_loop
async def test_head_is_get_without_the_body() -> None:
    async with serving() as served, await served.wire() as wire:
        for path in ("/health", "/metrics", "/v1/models", "/v1/models/fake"):
            head = await wire.ask("HEAD", path)
            assert head.status == 200
            assert int(head["content-length"]) > 0
        assert (await wire.ask("HEAD", "/nowhere")).status == 404
        assert (await wire.get("/health")).status == 200


@in_a_loop
async def test_cancel_ends_one_stream_by_its_id_or_all_of_them() -> None:
    async with serving() as served, await served.wire() as control:
        none = await control.post("/v1/cancel", {})
        assert none.json == {"status": "no_active_generation", "cancelled_count": 0}
        wires = [await served.wire() for _ in range(3)]
        ids = []
        for wire in wires:
            await wire.open_stream(ENDLESS)
            ids.append((await wire.frame()).json["id"])
        unknown = await control.post("/v1/cancel", {"id": "chatcmpl-unknown"})
        assert unknown.json["cancelled_count"] == 0
        assert served.num_live == 3
        one = await control.post("/v1/cancel", {"id": ids[0]})
        assert one.json == {"status": "cancelled", "cancelled_count": 1}
        *_, finish, done = await wires[0].rest()
        assert finish.json["choices"][0]["finish_reason"] == "abort"
        assert done == DONE
        assert served.num_live == 2
        rest = await control.ask("POST", "/v1/cancel", b"")
        assert rest.json == {"status": "cancelled", "cancelled_count": 2}
        for wire in wires:
            await wire.rest() if wire is not wires[0] else None
            await wire.close()
        assert served.num_live == 0
        assert served.num_ended("abort") == 3
