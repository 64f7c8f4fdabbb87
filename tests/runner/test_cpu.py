"""The forms that a model's layers get on a CPU: the same bits, or as near as is said."""

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
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.models.rope_utils import Llama3RoPE

from mlxlite.runner import cpu
from mlxlite.runner.cpu import (
    Parts,
    Rotations,
    _attends,
    _attention,
    _is_swiglu,
    _Linear,
    _LinearInParts,
    _parts,
    _swiglu,
    _width,
    fit,
    has_compiler,
    lay_out,
)
from mlxlite.runner.kv_cache import BatchCache, merge
from tests.runner.test_model_runner import MODELS, VOCABULARY, fresh

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no g++")


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
    """A layer as `fit` makes it."""
    holder = nn.Module()
    holder.layer = module
    fit(holder)
    return holder.layer


# --- the weights' layout --------------------------------------------------------------------------


def is_by_columns(weight: mx.array) -> bool:
    return not memoryview(weight).c_contiguous


@pytest.mark.parametrize("kind", MODELS)
def test_the_layout_of_the_weights_changes_no_bit(kind: str):
    model = fresh(kind)
    before = [model(tokens) for tokens in inputs()]
    mx.eval(before)
    lay_out(model)
    layers = [m for _, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert any(is_by_columns(layer.weight) for layer in layers)
    assert not any(is_by_columns(layer.weight) for layer in layers if "bias" in layer)
    for tokens, logits in zip(inputs(), before, strict=True):
        assert mx.array_equal(model(tokens), logits).item(), tokens.shape


@pytest.mark.parametrize("is_tied", [True, False])
def test_an_embedding_is_turned_only_where_it_is_the_output_layer(is_tied: bool):
    settings = {"model_type": "qwen3"} | MODELS["qwen3"] | {"tie_word_embeddings": is_tied}
    model = qwen3.Model(qwen3.ModelArgs.from_dict(settings))
    tokens = mx.array([[5, 9, 2]])
    before = model(tokens)
    mx.eval(before)
    for _ in range(2):  # the second time nothing changes
        lay_out(model)
        assert is_by_columns(model.model.embed_tokens.weight) == is_tied
        assert mx.array_equal(model(tokens), before).item()


def test_only_float32_matrices_are_turned():
    quantised = fresh("qwen3")
    nn.quantize(quantised, group_size=32, bits=4)
    half = fresh("qwen3")
    half.set_dtype(mx.bfloat16)
    for model in (quantised, half):
        lay_out(model)
        matrices = [array for _, array in tree_flatten(model.parameters()) if array.ndim == 2]
        assert matrices
        assert not any(map(is_by_columns, matrices))


# --- products in parts ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 16, 31, 77])
@pytest.mark.parametrize("shape", [(768, 256), (96, 1000), (4096, 256), (1000, 512), (33, 7)])
def test_a_product_in_parts_is_the_product(num_rows: int, shape: tuple[int, int]):
    weight = mx.random.normal(shape)
    parts = Parts(weight)
    for x in (
        mx.random.normal((num_rows, 1, shape[1])),
        mx.random.normal((1, num_rows, shape[1])),
        mx.random.normal((num_rows, shape[1])),
    ):
        y = parts.product(x)
        assert y.shape == (*x.shape[:-1], shape[0])
        assert mx.allclose(y, x @ weight.T, rtol=1e-5, atol=1e-4).item()


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 16, 32, 64, 500])
@pytest.mark.parametrize(
    "shape", [(256, 768), (256, 4096), (768, 256), (4096, 128_256), (64, 7919)]
)
def test_parts_are_small_products_that_make_up_the_whole(num_rows: int, shape: tuple[int, int]):
    num_inputs, num_outputs = shape
    width = _width(num_rows, num_inputs, num_outputs)
    if width is not None:
        assert num_outputs % width == 0
        assert 16 <= width < num_outputs
        assert num_rows * width <= 1024
        assert num_rows * width * num_inputs <= 1_000_000


def test_what_is_small_is_whole_and_what_stays_large_in_parts_too():
    assert _width(1, 256, 768) is None  # small
    assert _width(8, 256, 768) == 128
    assert _width(8, 256, 4096) == 128
    assert _width(16, 256, 4096) == 64
    assert _width(200, 256, 4096) is None
    assert _width(1, 64, 7919) is None  # a prime


def test_a_matrix_that_cannot_be_cut_is_turned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "blas_core", lambda: "Cooperlake")
    for num_outputs, form in ((4096, _LinearInParts), (4099, _Linear)):
        assert type(layer(nn.Linear(256, num_outputs, bias=False))) is form


@pytest.mark.parametrize("kind", MODELS)
def test_models_whose_matrices_are_in_parts_say_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
):
    model = fresh(kind)
    before = [model(tokens) for tokens in inputs()]
    mx.eval(before)
    seen: list[int] = []

    def width(num_rows: int, num_inputs: int, num_outputs: int) -> int:
        seen.append(min(16, num_outputs & -num_outputs))  # divides it
        return seen[-1]

    monkeypatch.setattr(cpu, "_FEW_ROWS", 10_000)  # no matrix is small
    monkeypatch.setattr(cpu, "_width", width)
    own = [array for _, array in tree_flatten(model.parameters())]
    for _ in range(2):  # the second time nothing changes
        lay_out(model, has_small_kernels=True)
    now = [array for _, array in tree_flatten(model.parameters())]
    assert all(a is b for a, b in zip(own, now, strict=True))
    for tokens, logits in zip(inputs(), before, strict=True):
        assert mx.allclose(model(tokens), logits, rtol=1e-5, atol=1e-4).item(), tokens.shape
    assert seen


def test_only_an_openblas_that_has_them_gives_small_kernels(monkeypatch: pytest.MonkeyPatch):
    for core, is_in_parts in (("Cooperlake", True), ("Haswell", False), (None, False)):
        monkeypatch.setattr(cpu, "blas_core", lambda core=core: core)
        large, small = nn.Linear(512, 512, bias=False), nn.Linear(64, 64, bias=False)
        assert (type(layer(large)) is _LinearInParts) == is_in_parts
        assert type(layer(small)) is _Linear
        assert is_by_columns(large.weight) != is_in_parts


# --- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_forms_change_no_model_by_more_than_rounding(kind: str):
    model = fresh(kind)
    before = [model(tokens) for tokens in inputs()]
    mx.eval(before)
    names = [name for name, _ in tree_flatten(model.parameters())]
    for _ in range(2):  # the second time nothing changes
        rotations = fit(model)
        assert [name for name, _ in tree_flatten(model.parameters())] == names
        for tokens, logits in zip(inputs(), before, strict=True):
            now = model(tokens)
            for own in rotations:
                own.forget()
            assert mx.allclose(now, logits, rtol=1e-5, atol=1e-4).item(), tokens.shape
            assert mx.array_equal(mx.argmax(now, -1), mx.argmax(logits, -1)).item(), tokens.shape


def test_only_the_model_at_hand_is_changed():
    fit(fresh("qwen3"))
    other = fresh("qwen3").model.layers[0]
    assert type(other.mlp) is qwen3.MLP
    assert type(other.input_layernorm) is nn.RMSNorm
    assert type(other.self_attn.rope) is nn.RoPE
    assert type(other.mlp.gate_proj) is nn.Linear


def test_without_a_compiler_nothing_is_fused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model = fresh("qwen3")
    fit(model)
    first = model.model.layers[0]
    assert type(first.mlp) is qwen3.MLP
    assert type(first.input_layernorm) is nn.RMSNorm
    assert type(first.self_attn.rope) is not nn.RoPE


# --- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_dims", "width"), [(16, 16), (8, 16), (64, 64)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("offset", [0, 5, 4000, [3], [0, -2, 700]])
@pytest.mark.parametrize("num_tokens", [1, 2, 19])
def test_a_rotation_is_mlx_s_bit_for_bit(
    num_dims: int, width: int, scale: float, offset: Any, num_tokens: int
):
    if isinstance(offset, list):
        offset = mx.array(offset)
    x = mx.random.normal((3, 2, num_tokens, width))
    plain = nn.RoPE(num_dims, base=5000.0, scale=scale)
    expected = plain(x, offset=offset)
    assert mx.array_equal(layer(plain)(x, offset=offset), expected).item()


def test_a_rotation_of_another_type_shape_or_kind_is_mlx_s():
    x = mx.random.normal((1, 2, 3, 16))
    for own in (x.astype(mx.bfloat16), x[0]):
        expected = nn.RoPE(16)(own, offset=4)
        assert mx.array_equal(layer(nn.RoPE(16))(own, offset=4), expected).item()
    others = (nn.RoPE(16, traditional=True), Llama3RoPE(16, scaling_config={"factor": 8.0}))
    for other in others:
        assert type(layer(other)) is type(other)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each set of tables was computed for."""
    seen: list[int] = []
    compute = Rotations._compute

    def noting(self: Rotations, offset: Any, num: int, width: int) -> Any:
        seen.append(num)
        return compute(self, offset, num, width)

    monkeypatch.setattr(Rotations, "_compute", noting)
    return seen


def test_the_layers_of_a_pass_compute_their_positions_once(monkeypatch: pytest.MonkeyPatch):
    model = fresh("qwen3")
    (rotations,) = fit(model)
    seen = counted(monkeypatch)
    rows = []
    for tokens in ([[1, 2, 3]], [[4, 5, 6, 7, 8]]):
        rows.append(make_prompt_cache(model))
        model(mx.array(tokens), cache=rows[-1])
        rotations.forget()
    assert seen == [3, 5]
    batch = BatchCache()
    batch.join(rows)
    for _ in range(2):
        batch.forward(model, mx.array([9, 10]))
        rotations.forget()
    assert seen == [3, 5, 1, 1]


def test_what_is_forgotten_is_computed_anew_and_what_is_not_is_not_mistaken():
    rope = layer(nn.RoPE(16))
    x = mx.random.normal((2, 2, 4, 16))
    for offset in (0, 7, mx.array([1, 2]), mx.array([3, 4]), 0):
        for own in (x, x[:, :, :2]):
            assert mx.array_equal(rope(own, offset=offset), nn.RoPE(16)(own, offset=offset)).item()


def test_layers_share_an_array_of_offsets_only_where_they_are_equally_far():
    model = fresh("qwen3")
    model.model.layers = model.model.layers * 2  # four caches
    caches = [make_prompt_cache(model) for _ in range(2)]
    for cache, num_tokens in zip(caches, (5, 3), strict=True):
        for number, own in enumerate(cache):
            length = num_tokens + (number == 2)
            own.update_and_fetch(*(mx.zeros((1, 2, length, 16)) for _ in range(2)))
    first, second, odd, last = merge(caches)
    assert first.offset is second.offset is last.offset
    assert first.offset is not odd.offset
    assert odd.offset.tolist() == [6, 4]


# --- attention -----------------------------------------------------------------------------------


def attend(*args: Any, **kwargs: Any) -> tuple[mx.array, mx.array]:
    """Ours, and mlx-lm's."""
    ours, theirs = (
        _attention(*args, **kwargs),
        base.scaled_dot_product_attention(*args, **kwargs),
    )
    mx.eval(ours, theirs)
    return ours, theirs


def heads(num_rows: int, num_heads: int, num_tokens: int, width: int = 16) -> mx.array:
    return mx.random.normal((num_rows, num_heads, num_tokens, width))


@pytest.mark.parametrize("num_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("kind", [None, "causal", "padding", "flat", "bias"])
def test_a_token_attends_as_with_mlx_lm(
    kind: str | None, num_rows: int, num_heads: tuple[int, int]
):
    own, shared = num_heads
    masks: dict[str | None, Any] = {
        None: None,
        "causal": "causal",
        "padding": mx.arange(40)[None, None, None] >= mx.arange(num_rows).reshape(-1, 1, 1, 1),
        "flat": mx.arange(40)[None] > 3,
        "bias": mx.random.normal((1, 1, 1, 40)),
    }
    args = heads(num_rows, own, 1), heads(num_rows, shared, 40), heads(num_rows, shared, 40, 8)
    ours, theirs = attend(*args, cache=None, scale=0.3, mask=masks[kind])
    assert ours.shape == theirs.shape == (num_rows, own, 1, 8)
    assert mx.array_equal(ours, theirs).item()


@pytest.mark.parametrize("num_queries", [2, 128, 129, 300, 512])
@pytest.mark.parametrize("num_before", [0, 1, 77, -1])
def test_a_long_chunk_attends_bit_for_bit_as_with_mlx_lm(num_queries: int, num_before: int):
    num_keys = num_before + num_queries
    args = heads(2, 4, num_queries), heads(2, 2, num_keys), heads(2, 2, num_keys)
    ours, theirs = attend(*args, cache=None, scale=0.25, mask="causal")
    assert mx.array_equal(ours, theirs).item()


def test_other_masks_sinks_heads_and_caches_are_mlx_lm_s():
    args = heads(1, 4, 200), heads(1, 2, 200), heads(1, 2, 200)
    mask = mx.tril(mx.ones((200, 200), mx.bool_))
    one = heads(1, 4, 1), heads(1, 2, 9), heads(1, 2, 9)
    own_mask = mx.random.normal((1, 4, 1, 9))  # of each head
    for given, more in (
        (args, {"mask": mask}),
        (args, {"mask": None}),
        (one, {"mask": own_mask}),
        (one, {"mask": None, "sinks": mx.random.normal((4,))}),
    ):
        ours, theirs = attend(*given, cache=None, scale=0.25, **more)
        assert mx.array_equal(ours, theirs).item()


def test_attention_is_known_by_the_function_that_it_calls():
    class Other(nn.Module):
        def __call__(self, x: Any) -> Any:
            return base.scaled_dot_product_attention(x, x, x, cache=None, scale=1.0, mask=None)

    assert _attends(qwen3.Attention)
    assert not any(map(_attends, (Other, qwen3.MLP, nn.Module)))
    model = fresh("qwen3")
    fit(model)
    form = type(model.layers[0].self_attn)
    assert issubclass(form, qwen3.Attention)
    assert form.__call__.__globals__["scaled_dot_product_attention"] is _attention
    assert qwen3.scaled_dot_product_attention is base.scaled_dot_product_attention


def test_a_prompt_of_many_chunks_is_what_it_was():
    model, prompt = fresh("qwen3"), mx.array([[(7 * i) % VOCABULARY for i in range(700)]])
    before = model(prompt)
    mx.eval(before)
    (rotations,) = fit(model)
    cache = make_prompt_cache(model)
    parts = []
    for start, stop in ((0, 300), (300, 431), (431, 700)):
        parts.append(model(prompt[:, start:stop], cache=cache))
        rotations.forget()
    now = mx.concatenate(parts, axis=1)
    assert mx.allclose(now, before, rtol=1e-4, atol=1e-4).item()
    assert mx.array_equal(mx.argmax(now, -1), mx.argmax(before, -1)).item()


# --- norms ---------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    "shape", [(1, 1, 64), (5, 1, 64), (1, 33, 64), (3, 1, 4, 64), (64,), (2, 90, 64)]
)
def test_a_norm_is_mlx_s_bit_for_bit(shape: tuple[int, ...]):
    norm = nn.RMSNorm(64, eps=1e-6)
    norm.weight = mx.random.normal((64,))
    x = mx.random.normal(shape) * 30
    half = x.astype(mx.bfloat16)
    expected = norm(x), norm(half)
    fitted = layer(norm)
    assert type(fitted) is not nn.RMSNorm
    for own, wanted in zip((fitted(x), fitted(half)), expected, strict=True):
        assert own.dtype == wanted.dtype
        assert mx.array_equal(own, wanted).item()


# --- SwiGLU --------------------------------------------------------------------------------------


@needs_compiler
def test_swiglu_is_as_near_to_the_exact_one_as_is_said():
    gate = mx.concatenate([mx.linspace(-100, 100, 200_001), mx.array([0.0, -0.0, 1e30, -1e30])])
    exact = np.array(gate).astype(np.float64)
    with np.errstate(over="ignore"):
        exact = exact / (1 + np.exp(-exact))
    ours = np.array(_swiglu(gate[:, None], mx.ones_like(gate)[:, None]))[:, 0]
    size = np.maximum(1, np.abs(np.array(gate).astype(np.float64)))
    assert np.isfinite(ours).all()
    assert (np.abs(ours - exact) / size).max() < 3e-7


@needs_compiler
def test_a_token_s_swiglu_does_not_depend_on_how_many_there_are():
    gate, up = (mx.random.normal((1, 77, 48)) * 5 for _ in range(2))
    whole = _swiglu(gate, up)
    assert whole.shape == gate.shape
    for i in (0, 63, 64, 76):
        alone = _swiglu(gate[:, i : i + 1], up[:, i : i + 1])
        assert mx.array_equal(whole[:, i : i + 1], alone).item()
    rows = _swiglu(gate.reshape(77, 1, 48)[:9], up.reshape(77, 1, 48)[:9])
    assert mx.array_equal(rows.reshape(1, 9, 48), whole[:, :9]).item()


def test_other_types_and_shapes_are_mlx_lm_s():
    gate = mx.random.normal((2, 3, 8))
    for own, other in ((gate.astype(mx.bfloat16), gate), (gate, gate[:1])):
        assert mx.array_equal(_swiglu(own, other), swiglu(own, other)).item()


@pytest.mark.parametrize("num_rows", [1, 2, 77, 2047, 2048, 5000])
def test_many_rows_are_few_shapes(num_rows: int):
    parts = list(_parts(num_rows))
    sizes = [part.stop - part.start for part in parts]
    assert sum(sizes) == num_rows
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert set(sizes) <= {2**i for i in range(12)}


class Clipped(qwen3.MLP):
    def __call__(self, x: Any) -> Any:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x))) + 1


class Crossed(qwen3.MLP):
    def __call__(self, x: Any) -> Any:
        return self.down_proj(swiglu(self.up_proj(x), self.gate_proj(x)))


def test_layers_are_known_by_what_they_do():
    llama4 = importlib.import_module("mlx_lm.models.llama4")
    gemma = importlib.import_module("mlx_lm.models.gemma3_text")
    assert _is_swiglu(qwen3.MLP)
    assert _is_swiglu(llama4.MLP)
    assert not any(map(_is_swiglu, (Clipped, Crossed, gemma.MLP, nn.Linear, nn.Module)))


# --- layers begun early --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_each_layer_is_begun_once_while_the_next_is_built(
    kind: str, monkeypatch: pytest.MonkeyPatch
):
    model = fresh(kind)
    for _ in range(2):  # the second time nothing changes
        fit(model)
    begun: list[Any] = []
    monkeypatch.setattr(mx, "async_eval", lambda *outputs: begun.append(outputs))
    logits = model(mx.array([[1, 2, 3]]), cache=make_prompt_cache(model))
    assert len(begun) == len(model.layers) - 1  # who wants the last one's output asks for it
    assert not any(logits is output for outputs in begun for output in outputs)


class Tailed(nn.Module):
    """Five layers, of which the last two use the third one's keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(8, 8) for _ in range(5)]

    def make_cache(self) -> list[KVCache]:
        return [KVCache() for _ in range(3)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_no_chunk_needs_is_begun_for_tokens_only(monkeypatch: pytest.MonkeyPatch):
    model = Tailed()
    fit(model)
    begun: list[Any] = []
    monkeypatch.setattr(mx, "async_eval", begun.append)
    model(mx.zeros((1, 7, 8)))
    assert len(begun) == 2
    model(mx.zeros((4, 1, 8)))
    assert len(begun) == 2 + 4


def test_a_begun_layer_is_what_it_was_to_who_looks():
    model = fresh("qwen3")
    own = type(model.layers[0])
    fit(model)
    *others, last = model.layers
    assert all(isinstance(layer, own) for layer in model.layers)
    assert {type(layer).__name__ for layer in model.layers} == {own.__name__}
    assert own not in {type(layer) for layer in others}
    assert type(last) is own
