"""The forms that a network's layers get on a CPU: the same bits, or as near as the module says."""

import importlib
import shutil
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import base, qwen3
from mlx_lm.models.activations import swiglu
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.rope_utils import Llama3RoPE

from mlxlite.runner import cpu
from mlxlite.runner.cpu import _attention, _part_width, _swiglu, _with_functions, optimize_for_cpu
from tests.runner.test_model_runner import MODELS, VOCABULARY, fresh

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    with mx.stream(mx.cpu):
        yield


def inputs() -> list[mx.array]:
    """Token ids `[B, T]`: alone and in a batch, one and many."""
    shapes = ((1, 1), (1, 33), (3, 1), (4, 5), (8, 1))
    return [
        mx.array([[(7 * i + row) % VOCABULARY for i in range(length)] for row in range(num_rows)])
        for num_rows, length in shapes
    ]


def layer(module: nn.Module) -> nn.Module:
    """A layer with its CPU form."""
    holder = nn.Module()
    holder.layer = module
    optimize_for_cpu(holder)
    return holder.layer


def is_changed(module: nn.Module) -> bool:
    """Whether a layer's class is one of ours."""
    return type(module).__module__ == cpu.__name__


# --- matrix products ------------------------------------------------------------------------------


@pytest.fixture
def has_small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_blas_core", lambda: "Cooperlake")


@pytest.mark.usefixtures("has_small_products")
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 16, 31, 77])
@pytest.mark.parametrize("shape", [(768, 256), (96, 1000), (4096, 256), (1000, 512), (33, 7)])
def test_a_product_by_parts_is_the_product(num_rows: int, shape: tuple[int, int]) -> None:
    weight = mx.random.normal(shape)
    linear, embedding = nn.Linear(1, 1, bias=False), nn.Embedding(1, 1)
    linear.weight = embedding.weight = weight
    multiply = layer(linear), layer(embedding).as_linear
    for x in (
        mx.random.normal((num_rows, 1, shape[1])),
        mx.random.normal((1, num_rows, shape[1])),
        mx.random.normal((num_rows, shape[1])),
    ):
        for product in multiply:
            y = product(x)
            assert y.shape == (*x.shape[:-1], shape[0])
            assert mx.allclose(y, x @ weight.T, rtol=1e-5, atol=1e-4).item()


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 16, 32, 64, 500])
@pytest.mark.parametrize(
    "shape", [(256, 768), (256, 4096), (768, 256), (4096, 128_256), (64, 7919)]
)
def test_parts_are_small_products_that_make_up_the_whole(
    num_rows: int, shape: tuple[int, int]
) -> None:
    num_inputs, num_outputs = shape
    width = _part_width(num_rows, num_outputs, num_inputs)
    if width is not None:
        assert num_outputs % width == 0
        assert 16 <= width < num_outputs
        assert num_rows * width <= 1024
        assert num_rows * width * num_inputs <= 1_000_000


def test_a_small_product_is_whole_and_one_without_small_parts_too() -> None:
    assert _part_width(1, 768, 256) is None  # small
    assert _part_width(8, 768, 256) == 128
    assert _part_width(8, 4096, 256) == 128
    assert _part_width(16, 4096, 256) == 64
    assert _part_width(200, 4096, 256) is None
    assert _part_width(1, 7919, 64) is None  # a prime


@pytest.mark.usefixtures("has_small_products")
def test_only_large_float32_matrices_without_bias_are_multiplied_by_parts() -> None:
    large = nn.Linear(256, 4096, bias=False)
    half = nn.Linear(256, 4096, bias=False)
    half.set_dtype(mx.bfloat16)
    others = half, nn.Linear(256, 4096), nn.Linear(64, 64, bias=False), nn.Linear(256, 4099)
    assert is_changed(layer(large))
    assert not any(is_changed(layer(other)) for other in others)


def test_only_an_openblas_that_has_small_products_gets_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for core, is_split in (("Cooperlake", True), ("Haswell", False), (None, False)):
        monkeypatch.setattr(cpu, "_blas_core", lambda core=core: core)
        assert is_changed(layer(nn.Linear(512, 512, bias=False))) == is_split


@pytest.mark.usefixtures("has_small_products")
@pytest.mark.parametrize("kind", MODELS)
def test_models_that_multiply_by_parts_compute_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh(kind)
    before = [model(tokens) for tokens in inputs()]
    mx.eval(before)
    seen: list[int] = []

    def width(num_rows: int, num_outputs: int, num_inputs: int) -> int:
        seen.append(min(16, num_outputs & -num_outputs))  # divides it
        return seen[-1]

    monkeypatch.setattr(cpu, "_part_width", width)
    own = [array for _, array in tree_flatten(model.parameters())]
    optimize_for_cpu(model)
    now = [array for _, array in tree_flatten(model.parameters())]
    assert all(a is b for a, b in zip(own, now, strict=True))
    for tokens, logits in zip(inputs(), before, strict=True):
        assert mx.allclose(model(tokens), logits, rtol=1e-5, atol=1e-4).item(), tokens.shape
    assert seen


# --- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_forms_change_no_model_by_more_than_rounding(kind: str) -> None:
    model = fresh(kind)
    before = [model(tokens) for tokens in inputs()]
    mx.eval(before)
    names = [name for name, _ in tree_flatten(model.parameters())]
    optimize_for_cpu(model)
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    for tokens, logits in zip(inputs(), before, strict=True):
        now = model(tokens)
        assert mx.allclose(now, logits, rtol=1e-5, atol=1e-4).item(), tokens.shape
        assert mx.array_equal(mx.argmax(now, -1), mx.argmax(logits, -1)).item(), tokens.shape


def test_only_the_given_network_is_changed() -> None:
    optimize_for_cpu(fresh("qwen3"))
    other = fresh("qwen3")
    assert type(other) is qwen3.Model
    assert type(other.model.layers[0]) is qwen3.TransformerBlock
    assert type(other.model.layers[0].mlp) is qwen3.MLP
    assert type(other.model.layers[0].input_layernorm) is nn.RMSNorm
    assert type(other.model.layers[0].self_attn.rope) is nn.RoPE
    assert type(other.model.layers[0].mlp.gate_proj) is nn.Linear


@pytest.mark.parametrize("missing", ["compiler", "cpu"])
def test_on_a_gpu_and_without_a_compiler_nothing_is_changed(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    model = fresh("qwen3")
    optimize_for_cpu(model)
    assert not any(map(is_changed, model.modules()))


# --- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_dims", "width"), [(16, 16), (8, 16), (64, 64)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("offset", [0, 5, 4000, [3], [0, -2, 700]])
@pytest.mark.parametrize("num_tokens", [1, 2, 19])
def test_a_rotation_is_mlx_s_bit_for_bit(
    num_dims: int, width: int, scale: float, offset: Any, num_tokens: int
) -> None:
    if isinstance(offset, list):
        offset = mx.array(offset)
    x = mx.random.normal((3, 2, num_tokens, width))
    plain = nn.RoPE(num_dims, base=5000.0, scale=scale)
    expected = plain(x, offset=offset)
    mx.eval(expected)
    assert mx.array_equal(layer(plain)(x, offset=offset), expected).item()


def test_a_rotation_of_another_type_shape_or_kind_is_mlx_s() -> None:
    x = mx.random.normal((1, 2, 1, 16))
    for own in (x.astype(mx.bfloat16), x[0]):
        expected = nn.RoPE(16)(own, offset=4)
        assert mx.array_equal(layer(nn.RoPE(16))(own, offset=4), expected).item()
    others = (nn.RoPE(16, traditional=True), Llama3RoPE(16, scaling_config={"factor": 8.0}))
    for other in others:
        assert not is_changed(layer(other))


# --- attention -----------------------------------------------------------------------------------


def attend(*args: Any, **kwargs: Any) -> tuple[mx.array, mx.array]:
    """Ours, and mlx-lm's."""
    ours = _attention(*args, **kwargs)
    theirs = base.scaled_dot_product_attention(*args, **kwargs)
    mx.eval(ours, theirs)
    return ours, theirs


def heads(num_rows: int, num_heads: int, num_tokens: int, width: int = 16) -> mx.array:
    return mx.random.normal((num_rows, num_heads, num_tokens, width))


@pytest.mark.parametrize("num_queries", [2, 128, 129, 300, 512])
@pytest.mark.parametrize("num_before", [0, 1, 77, -1])
def test_a_long_chunk_attends_bit_for_bit_as_with_mlx_lm(num_queries: int, num_before: int) -> None:
    num_keys = num_before + num_queries
    args = heads(2, 4, num_queries), heads(2, 2, num_keys), heads(2, 2, num_keys)
    ours, theirs = attend(*args, cache=None, scale=0.25, mask="causal")
    if cpu._blas_core() is not None and num_keys > 256:  # it sums more terms in two parts
        assert mx.allclose(ours, theirs, rtol=0, atol=1e-6).item()
    else:
        assert mx.array_equal(ours, theirs).item()


def test_other_masks_and_sinks_are_as_with_mlx_lm() -> None:
    args = heads(1, 4, 200), heads(1, 2, 200), heads(1, 2, 200)
    one = heads(1, 4, 1), heads(1, 2, 9), heads(1, 2, 9)
    for given, more in (
        (args, {"mask": mx.tril(mx.ones((200, 200), mx.bool_))}),
        (args, {"mask": None}),
        (args, {"mask": "causal", "sinks": mx.random.normal((4,))}),
        (one, {"mask": "causal"}),
        (one, {"mask": mx.random.normal((1, 4, 1, 9))}),
        (one, {"mask": None, "sinks": mx.random.normal((4,))}),
    ):
        ours, theirs = attend(*given, cache=None, scale=0.25, **more)
        assert mx.array_equal(ours, theirs).item()


def test_attention_is_known_by_the_function_that_it_calls() -> None:
    class Other(nn.Module):
        def __call__(self, x: Any) -> Any:
            return base.scaled_dot_product_attention(x, x, x, cache=None, scale=1.0, mask=None)

    form = _with_functions(qwen3.Attention)
    assert issubclass(form, qwen3.Attention)
    assert form.__call__.__globals__["scaled_dot_product_attention"] is _attention
    assert qwen3.scaled_dot_product_attention is base.scaled_dot_product_attention
    for other in (Other, nn.Module, nn.LayerNorm):
        assert _with_functions(other) is other


def test_a_prompt_of_many_chunks_is_what_it_was() -> None:
    model, prompt = fresh("qwen3"), mx.array([[(7 * i) % VOCABULARY for i in range(700)]])
    before = model(prompt)
    mx.eval(before)
    optimize_for_cpu(model)
    cache = make_prompt_cache(model)
    chunks = ((0, 300), (300, 431), (431, 700))
    now = mx.concatenate([model(prompt[:, i:j], cache=cache) for i, j in chunks], axis=1)
    assert mx.allclose(now, before, rtol=1e-4, atol=1e-4).item()
    assert mx.array_equal(mx.argmax(now, -1), mx.argmax(before, -1)).item()


# --- norms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 1, 64), (5, 1, 64), (1, 33, 64), (3, 1, 4, 64), (64,), (2, 90, 64)]
)
def test_a_norm_is_mlx_s_bit_for_bit(shape: tuple[int, ...]) -> None:
    norm = nn.RMSNorm(64, eps=1e-6)
    norm.weight = mx.random.normal((64,))
    x = mx.random.normal(shape) * 30
    half = x.astype(mx.bfloat16)
    expected = norm(x), norm(half)
    mx.eval(expected)
    ours = layer(norm)
    assert is_changed(ours)
    for own, wanted in zip((ours(x), ours(half)), expected, strict=True):
        assert own.dtype == wanted.dtype
        assert mx.array_equal(own, wanted).item()


# --- SwiGLU --------------------------------------------------------------------------------------


def test_swiglu_is_within_its_documented_error_of_the_exact_one() -> None:
    gate = mx.concatenate([mx.linspace(-100, 100, 200_001), mx.array([0.0, -0.0, 1e30, -1e30])])
    exact = np.array(gate).astype(np.float64)
    with np.errstate(over="ignore"):
        exact = exact / (1 + np.exp(-exact))
    ours = np.array(_swiglu(gate[:, None], mx.ones_like(gate)[:, None]))[:, 0]
    size = np.maximum(1, np.abs(np.array(gate).astype(np.float64)))
    assert np.isfinite(ours).all()
    assert (np.abs(ours - exact) / size).max() < 3e-7


def test_a_token_s_swiglu_does_not_depend_on_how_many_there_are() -> None:
    gate, up = (mx.random.normal((1, 77, 48)) * 5 for _ in range(2))
    whole = _swiglu(gate, up)
    assert whole.shape == gate.shape
    for i in (0, 63, 64, 76):
        alone = _swiglu(gate[:, i : i + 1], up[:, i : i + 1])
        assert mx.array_equal(whole[:, i : i + 1], alone).item()
    rows = _swiglu(gate.reshape(77, 1, 48)[:9], up.reshape(77, 1, 48)[:9])
    assert mx.array_equal(rows.reshape(1, 9, 48), whole[:, :9]).item()


def test_other_types_and_shapes_are_mlx_lm_s() -> None:
    gate = mx.random.normal((2, 3, 8))
    for own, other in ((gate.astype(mx.bfloat16), gate), (gate, gate[:1])):
        assert mx.array_equal(_swiglu(own, other), swiglu(own, other)).item()


def test_all_numbers_of_rows_are_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: set[tuple[int, ...]] = set()

    def gated(gate: mx.array, up: mx.array) -> mx.array:
        shapes.add(gate.shape)
        return gate * up

    monkeypatch.setattr(cpu, "_gated", gated)
    for num_rows in (*range(33, 300), 2047, 2048, 5000):
        gate, up = (mx.random.normal((1, num_rows, 2)) for _ in range(2))
        assert mx.array_equal(_swiglu(gate, up), gate * up).item()
    assert shapes == {(2**i, 2) for i in range(13)}


def test_swiglu_is_known_by_the_function_that_is_called() -> None:
    llama4 = importlib.import_module("mlx_lm.models.llama4")
    gemma = importlib.import_module("mlx_lm.models.gemma3_text")
    for own in (qwen3.MLP, llama4.MLP):
        assert _with_functions(own).__call__.__globals__["swiglu"] is _swiglu
    assert _with_functions(gemma.MLP) is gemma.MLP


# --- early dispatch ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_layers_of_single_tokens_are_dispatched_while_the_next_ones_are_built(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh(kind)
    optimize_for_cpu(model)
    cache = make_prompt_cache(model)
    dispatched: list[mx.array] = []
    monkeypatch.setattr(mx, "async_eval", dispatched.append)
    model(mx.array([[1, 2, 3]]), cache=cache)
    assert dispatched == []
    logits = model(mx.array([[4]]), cache=cache)
    assert len(dispatched) == len(model.layers) + 1
    assert dispatched[-1] is logits


def test_a_form_is_a_subclass_of_the_same_name() -> None:
    model, plain = fresh("qwen3"), fresh("qwen3")
    optimize_for_cpu(model)
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(ours, type(theirs))
    assert type(model.layers[0]).__name__ == "TransformerBlock"
