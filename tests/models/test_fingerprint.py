"""The fingerprint of a checkpoint: what changes it and what does not."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import NUM_TOKENS, edit, loaded, save_checkpoint

from mlxlite.models.fingerprint import fingerprint_of, pieces
from mlxlite.models.load import LoadedModel


def change_weights(path: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    weights = dict(mx.load(str(path / "model.safetensors")))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(path / "new.safetensors"), weights)
    (path / "new.safetensors").rename(path / "model.safetensors")


def test_a_fingerprint_is_16_hexadecimal_digits(model: LoadedModel) -> None:
    assert re.fullmatch("[0-9a-f]{16}", model.fingerprint)


def test_the_fingerprint_is_the_same_wherever_the_model_lies(
    copy: Path, model: LoadedModel
) -> None:
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    assert loaded(copy / "config.json").fingerprint == model.fingerprint


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "other.json"])
def test_the_fingerprint_is_not_of_what_leaves_the_network_alone(
    copy: Path, model: LoadedModel, name: str
) -> None:
    edit(copy / name, unrelated="value")
    assert loaded(copy).fingerprint == model.fingerprint


def test_the_fingerprint_is_of_the_configuration(copy: Path, model: LoadedModel) -> None:
    edit(copy / "config.json", rope_theta=10001.0)
    assert loaded(copy).fingerprint != model.fingerprint


def test_another_model_of_the_same_shape_has_another_fingerprint(
    tmp_path: Path, model: LoadedModel
) -> None:
    assert loaded(save_checkpoint(tmp_path / "other", seed=1)).fingerprint != model.fingerprint


def two_rows_swapped(weights: dict[str, mx.array]) -> None:
    rows = mx.arange(NUM_TOKENS)
    rows[5], rows[6] = 6, 5
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][rows]


def two_layers_swapped(weights: dict[str, mx.array]) -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    weights[names[0]], weights[names[1]] = weights[names[1]], weights[names[0]]


def test_the_fingerprint_is_of_the_last_bit_of_the_weights(copy: Path, model: LoadedModel) -> None:
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # the lowest of a little-endian float32
    path.write_bytes(content)
    assert loaded(copy).fingerprint != model.fingerprint


@pytest.mark.parametrize("change", [two_rows_swapped, two_layers_swapped])
def test_the_fingerprint_is_of_every_weight(
    copy: Path, model: LoadedModel, change: Callable[[dict[str, mx.array]], None]
) -> None:
    change_weights(copy, change)
    assert loaded(copy).fingerprint != model.fingerprint


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_weights_have_a_fingerprint(
    copy: Path, model: LoadedModel, dtype: mx.Dtype
) -> None:
    change_weights(copy, lambda w: w.update({name: a.astype(dtype) for name, a in w.items()}))
    fingerprints = {loaded(copy).fingerprint}
    change_weights(copy, lambda w: w.update({"model.norm.weight": w["model.norm.weight"] * 2}))
    fingerprints.add(loaded(copy).fingerprint)
    assert len(fingerprints | {model.fingerprint}) == 3


def test_shards_are_found_by_their_names_and_not_by_the_index(
    copy: Path, model: LoadedModel
) -> None:
    """The app saves the first shard as model.safetensors; the index names a file that is not there.

    The fingerprint covers every weight, so an equal one means that none is missing.
    """
    weights = list(mx.load(str(copy / "model.safetensors")).items())
    half = len(weights) // 2
    mx.save_safetensors(str(copy / "model-00002-of-00002.safetensors"), dict(weights[half:]))
    first = copy / "model.safetensors"
    mx.save_safetensors(str(copy / "other.safetensors"), dict(weights[:half]))
    (copy / "other.safetensors").rename(first)
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    names = {name: shards[number >= half] for number, (name, _) in enumerate(weights)}
    edit(copy / "model.safetensors.index.json", metadata={}, weight_map=names)
    assert loaded(first).fingerprint == model.fingerprint


# --- the sample of a tensor -------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [0, 1, 4095, 4096, 4097, 30_000, 32 << 10])
def test_a_small_tensor_is_read_whole(num_bytes: int) -> None:
    sampled = {place for start, stop in pieces(num_bytes) for place in range(start, stop)}
    assert sampled == set(range(num_bytes))


@pytest.mark.parametrize("num_bytes", [(32 << 10) + 1, 500_000, 2 << 20, (5 << 20) + 7, 3 << 30])
def test_a_large_tensor_is_read_at_its_ends_and_at_bounded_distances(num_bytes: int) -> None:
    starts, stops = zip(*pieces(num_bytes), strict=True)
    assert starts[0] == 0
    assert stops[-1] == num_bytes
    gaps = [start - stop for stop, start in zip(stops, starts[1:], strict=False)]
    assert max(gaps) < min(256 << 10, num_bytes // 8)
    assert len(starts) <= max(10, num_bytes // (256 << 10) + 2)


def save_tensor(path: Path, array: np.ndarray[Any, Any]) -> list[Path]:
    path.mkdir()
    (path / "config.json").write_text("{}")
    mx.save_safetensors(str(path / "model.safetensors"), {"weight": mx.array(array)})
    return [path / "model.safetensors"]


@pytest.mark.parametrize("every", [1, 100, 4096])
def test_a_change_all_over_a_large_tensor_is_noticed(tmp_path: Path, every: int) -> None:
    weight = np.zeros((3000, 1024), np.uint8)
    before = save_tensor(tmp_path / "before", weight)
    weight.reshape(-1)[every // 2 :: every] = 1
    after = save_tensor(tmp_path / "after", weight)
    one, two = (fingerprint_of(files[0].parent, files, None) for files in (before, after))
    assert one != two


@pytest.mark.parametrize(
    "changes", [{"name": "b"}, {"dtype": mx.int8}, {"shape": (4, 16)}], ids=lambda c: next(iter(c))
)
def test_the_fingerprint_is_of_the_names_types_and_shapes(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    def saved(name: str = "a", dtype: mx.Dtype = mx.uint8, shape: tuple[int, ...] = (8, 8)) -> str:
        path = tmp_path / "model.safetensors"
        mx.save_safetensors(str(path), {name: mx.ones(shape, dtype)})
        return fingerprint_of(tmp_path, [path], None)

    (tmp_path / "config.json").write_text("{}")
    assert saved() == saved()
    assert saved(**changes) != saved()
