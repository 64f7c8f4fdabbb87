"""Fixtures of the room `models`: the tiny checkpoint loaded, and copies of it to change."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import NUM_TOKENS, THINKING, edit, loaded

from mlxlite.models.load import LoadedModel


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of this test's own, to be spoilt."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return loaded(checkpoint)


@pytest.fixture
def thinker(copy: Path) -> Path:
    """A checkpoint for whose tokens mlx-lm would set `enable_thinking` unasked."""
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    for number, text in enumerate(("<think>", "</think>")):
        token = tokenizer["added_tokens"][-1] | {"id": NUM_TOKENS + number, "content": text}
        tokenizer["added_tokens"].append(token)
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    return edit(copy / "tokenizer_config.json", chat_template=THINKING)
