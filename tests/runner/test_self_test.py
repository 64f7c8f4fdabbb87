"""The self-test at the start: what a model's rows do wrongly together is switched off."""

import logging
from typing import Any

import mlx.core as mx
import pytest
from fakes import drive, make_sequence
from mlx import nn

from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.step import Add
from mlxlite.runner.model_runner import ModelRunner
from tests.runner.test_model_runner import build, judge

CANNOT = "this model's rows cannot"


class Wrong(nn.Module):
    """A model whose logits are other ones beside another row; its caches are right."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def layers(self) -> Any:
        return self.model.layers

    def make_cache(self) -> Any:
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self.model)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        logits: mx.array = self.model(tokens, cache=cache)
        return logits * (1.0 + 0.5 * (tokens.shape[0] > 1)) + 3.0 * mx.sin(
            logits * (tokens.shape[0] > 1)
        )


class Unbatched(Wrong):
    """A model that raises for more than one row."""

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        if tokens.shape[0] > 1:
            raise TypeError("only one row")
        return self.model(tokens, cache=cache)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "mamba2", "falcon_h1", "lfm2"])
def test_what_a_model_does_right_stays_on(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    runner = ModelRunner(build(kind))
    was = runner._prefills.can_pack
    runner.warm_up()
    assert (runner._prefills.can_pack, runner._can_merge) == (was, True)
    assert not [record for record in caplog.records if CANNOT in record.getMessage()]


def test_a_state_that_ignores_the_lengths_of_rows_is_not_packed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = ModelRunner(build("mamba"))
    with caplog.at_level(logging.WARNING):
        runner.warm_up()
    assert (runner._prefills.can_pack, runner._can_merge) == (False, True)
    (line,) = [record.getMessage() for record in caplog.records if CANNOT in record.getMessage()]
    assert "prefill together: logits are off by" in line
    sequences = [make_sequence(i, n) for i, n in enumerate((10, 9, 8), start=1)]
    run = drive(Scheduler(Policy(max_rows=8)), runner, {0: [Add(s) for s in sequences]})
    for sequence in sequences:
        assert run.tokens(sequence.id) == judge("mamba", sequence)


@pytest.mark.parametrize(("wrong", "can_pack"), [(Wrong, True), (Unbatched, False)])
def test_a_model_that_is_right_only_alone_decodes_row_by_row(
    wrong: type[Wrong], can_pack: bool, caplog: pytest.LogCaptureFixture
) -> None:
    runner = ModelRunner(wrong(build("qwen3")))
    with caplog.at_level(logging.WARNING):
        runner.warm_up()
    assert (runner._prefills.can_pack, runner._can_merge) == (can_pack, False)
    lines = [record for record in caplog.records if CANNOT in record.getMessage()]
    assert len(lines) == 2 - can_pack
    sequences = [make_sequence(i, n) for i, n in enumerate((10, 9, 30), start=1)]
    run = drive(Scheduler(Policy(max_rows=8)), runner, {0: [Add(s) for s in sequences]})
    for sequence in sequences:
        assert run.tokens(sequence.id) == judge("qwen3", sequence)
