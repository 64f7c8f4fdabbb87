"""What a CPU computes faster than MLX's back end there does by itself: a model's float32 layers.

On a GPU norms, rotations and the like are kernels of MLX's own. On a CPU each is a dozen small
operations, whose cost is that of their number: the host builds them, one thread takes them in turn.
And an exponential is computed one number at a time. So `fit` gives the layers of a loaded model
other forms of the same: fewer operations, done once for all layers where they are the same in all,
and weights that lie as BLAS reads them. And each layer is begun while the host builds the next one:
the CPU has no queue that would hold a whole step, and would stand idle while one is built.

It knows layers by their exact class, or by the code of their `__call__`: whatever it does not know
it leaves alone, and nothing of mlx or mlx-lm is changed for other users of the process. With the
BLAS that comes with MLX all forms give the same bits as MLX's (tested), but for SwiGLU, which is
within 3e-7 of the exact one, relative to the gate, or to 1 where that is less (tested). Where there
is no compiler for MLX's fused kernels the forms that need one are not taken. Lives on the lane.
"""

import ctypes
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from types import FunctionType
from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import make_prompt_cache

log = logging.getLogger("mlxlite.model")
# Rows of one decode step, which are fused as they are: each number of rows is traced once. Other
# inputs are fused in parts of 1, 2, 4 … 2048 rows, so that there are few traces.
_MOST_ROWS = 32
_MOST_PART_ROWS = 2048


def is_cpu() -> bool:
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def has_compiler() -> bool:
    """Whether MLX's CPU back end can build fused kernels, which it does with g++ at run time."""
    return shutil.which("g++") is not None


def disable_compile_without_compiler() -> None:
    """Turn MLX's fused kernels off on a CPU without g++, where each of them would fail."""
    if is_cpu() and not has_compiler():
        log.info("no g++ on this machine: fused kernels are off")
        mx.disable_compile()


def fit(model: nn.Module) -> "tuple[Rotations, ...]":
    """Give the layers of a loaded model their forms for a CPU; what they remember. Idempotent.

    To be called again when weights have changed.
    """
    lay_out(model, blas_core() in _WITH_SMALL_KERNELS)
    can_fuse = has_compiler()
    rotations: dict[tuple[Any, ...], Rotations] = {}
    for _, layer in model.named_modules():
        own: Any = type(layer)
        if own in (nn.RoPE, _RoPE) and not layer.traditional:
            kind = layer.dims, layer.base, layer.scale
            _set(layer, _RoPE, rotations=rotations.setdefault(kind, Rotations(*kind)))
        elif can_fuse and own is nn.RMSNorm and layer.weight.dtype == mx.float32:
            share = mx.array(1.0 / layer.weight.size, mx.float32)
            _set(layer, _RMSNorm, share=share, least=mx.array(layer.eps, mx.float32))
        elif can_fuse and _is_swiglu(own):
            _set(layer, _fused(own))
        elif _attends(own):
            _set(layer, _attending(own))
    layers = list(getattr(model, "layers", ()))
    num_kept = len(make_prompt_cache(model)) if layers else 0
    for number, layer in enumerate(layers[:-1]):
        if isinstance(layer, nn.Module) and not isinstance(layer, _Begun):
            own = type(layer)
            _set(layer, _begun(own, number < num_kept - 1))
    return tuple(rotations.values())


def _set(layer: nn.Module, form: type, **attributes: Any) -> None:
    """Make a layer one of another class. What that class needs is no parameter of the model."""
    layer.__class__ = form
    for name, value in attributes.items():
        object.__setattr__(layer, name, value)
    mx.eval([value for value in attributes.values() if isinstance(value, mx.array)])


# --- layers -----------------------------------------------------------------------------------


class _Begun:
    """A layer whose output is begun as soon as it is known what it is."""


@cache  # one for each class of layer
def _begun(layer: type, is_always: bool) -> type:
    """A subclass of a model's layer.

    Of a chunk only keys and values are needed: the last layer's output is not, nor is that of any
    behind the last which keeps some. Those are begun for single tokens.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = layer.__call__(self, *args, **kwargs)
        if is_always or (args and isinstance(args[0], mx.array) and args[0].shape[-2] == 1):
            mx.async_eval(output)
        return output

    return type(layer.__name__, (layer, _Begun), {"__call__": call, "__module__": __name__})


# --- matrices ---------------------------------------------------------------------------------

# For these OpenBLAS has kernels for small products, which read a matrix as it lies. Before any
# other it copies the whole matrix, which for a few rows takes longer than the product.
_WITH_SMALL_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")
# Its bounds of a small product: all three sizes multiplied, and the size of what comes out.
_MOST_WORK = 1_000_000
_MOST_OUTPUTS = 1024
_LEAST_WIDTH = 16
_FEW_ROWS = 8  # a matrix whose product with so many is small need not be cut


def blas_core() -> str | None:
    """The processor that a preloaded OpenBLAS takes this one for; None with another BLAS."""
    name = getattr(ctypes.CDLL(None), "openblas_get_corename", None)
    if name is None:
        return None
    name.restype = ctypes.c_char_p
    return str(name().decode())


def lay_out(model: nn.Module, has_small_kernels: bool = False) -> None:
    """Have float32 matrices lie, and multiplied, as a CPU's BLAS is fastest at. Idempotent.

    A layer's product is x @ weight.T: it is stored as it is multiplied, and the same bits come out.
    Large ones stay as they are where BLAS `has_small_kernels`, and are multiplied in parts, unless
    there are none of one width.
    Embeddings are treated alike where they are the output layer; layers with a bias are left alone,
    which BLAS would round differently.
    """
    modules = [module for _, module in model.named_modules()]
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    widths = {linear.weight.shape[0] for linear in linears}
    embeddings = [module for module in modules if isinstance(module, nn.Embedding)]
    tied = [embedding for embedding in embeddings if embedding.weight.shape[0] not in widths]
    for layer in (*(linear for linear in linears if "bias" not in linear), *tied):
        if layer.weight.dtype != mx.float32 or layer.weight.ndim != 2:
            continue
        form = _IN_PARTS.get(type(layer)) if has_small_kernels else None
        if form is not None and _is_cut(*layer.weight.shape):
            _set(layer, form, parts=Parts(layer.weight))
            continue
        turned = mx.contiguous(layer.weight.T)
        layer.weight = turned.T
        mx.eval(turned, layer.weight)  # one at a time: the old one goes before the next comes
        if (form := _TURNED.get(type(layer))) is not None:
            _set(layer, form, turned=turned)


class Parts:
    """A matrix `[N, K]` in parts so narrow that their products are small. They share its memory."""

    def __init__(self, weight: mx.array) -> None:
        self._weight = weight
        self._views: dict[int, mx.array] = {}  # [N / width, K, width], by the width

    def product(self, x: mx.array) -> mx.array:
        """x @ weight.T, for x `[..., K]`."""
        num_outputs, num_inputs = self._weight.shape
        num_rows = x.size // num_inputs
        width = _width(num_rows, num_inputs, num_outputs)
        if width is None:
            return x @ self._weight.T
        if (view := self._views.get(width)) is None:
            view = self._weight.reshape(-1, width, num_inputs).swapaxes(1, 2)
            mx.eval(view)
            self._views[width] = view
        y = x.reshape(1, num_rows, num_inputs) @ view  # [N / width, rows, width]
        if num_rows > 1:
            y = y.swapaxes(0, 1)
        return y.reshape(*x.shape[:-1], num_outputs)


def _is_cut(num_outputs: int, num_inputs: int) -> bool:
    is_large = _FEW_ROWS * num_outputs * num_inputs > _MOST_WORK
    return is_large and _width(_FEW_ROWS, num_inputs, num_outputs) is not None


@lru_cache(maxsize=4096)
def _width(num_rows: int, num_inputs: int, num_outputs: int) -> int | None:
    """Columns of a part, a power of two; None where the whole is small, or no part would be."""
    if (
        num_rows * num_outputs <= _MOST_OUTPUTS
        and num_rows * num_inputs * num_outputs <= _MOST_WORK
    ):
        return None
    most = min(_MOST_OUTPUTS, _MOST_WORK // num_inputs) // num_rows
    width = 1 << most.bit_length() - 1 if most else 0
    while width > num_outputs or (width and num_outputs % width):
        width //= 2
    return width if width >= _LEAST_WIDTH else None


class _Linear(nn.Linear):
    """One operation fewer for each product. `turned` shares its memory with the weight."""

    turned: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.turned


class _Embedding(nn.Embedding):
    turned: mx.array

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self.turned


class _LinearInParts(nn.Linear):
    parts: Parts

    def __call__(self, x: mx.array) -> mx.array:
        return self.parts.product(x)


class _EmbeddingInParts(nn.Embedding):
    parts: Parts

    def as_linear(self, x: mx.array) -> mx.array:
        return self.parts.product(x)


_TURNED: dict[type, type] = {
    nn.Linear: _Linear,
    _Linear: _Linear,
    nn.Embedding: _Embedding,
    _Embedding: _Embedding,
}
_IN_PARTS: dict[type, type] = {
    nn.Linear: _LinearInParts,
    _LinearInParts: _LinearInParts,
    nn.Embedding: _EmbeddingInParts,
    _EmbeddingInParts: _EmbeddingInParts,
}


# --- positions --------------------------------------------------------------------------------


class Rotations:
    """The cosines and sines of the last positions asked for, which all layers of a pass share.

    Positions are told apart by the offset: a number, or the very array that the layers' caches
    share (see `caches.BatchCache`). Whoever has run a pass says so: `forget`.
    """

    def __init__(self, num_dims: int, base: float, scale: float) -> None:
        half = num_dims // 2
        steps = mx.arange(0, -half, -1, dtype=mx.float32)
        self._speeds = mx.exp(steps * mx.array(math.log(base) / half, mx.float32))
        self._scale = mx.array(scale, mx.float32)
        mx.eval(self._speeds, self._scale)
        self.forget()

    def forget(self) -> None:
        """Give back the tables; they take as much as T tokens have heads' dimensions."""
        self._offset: int | mx.array | None = None
        self._size = (0, 0)
        self._tables: tuple[mx.array, mx.array] | None = None

    def tables(self, offset: int | mx.array, size: tuple[int, int]) -> tuple[mx.array, mx.array]:
        """What to multiply a head with, and its halves the other way round: `[B, 1, T, D]`.

        `size` is T and D; B is 1 where the offset is a number. Behind the dimensions that are
        turned they leave a head as it is.
        """
        are_numbers = isinstance(offset, int) and isinstance(self._offset, int)
        is_known = offset == self._offset if are_numbers else offset is self._offset
        if self._tables is None or not is_known or size != self._size:
            self._tables = self._compute(offset, *size)
            self._offset, self._size = offset, size
        return self._tables

    def _compute(self, offset: int | mx.array, num: int, width: int) -> tuple[mx.array, mx.array]:
        start = mx.array(offset) if isinstance(offset, int) else offset.reshape(-1, 1)
        positions = (mx.arange(num, dtype=mx.float32) + start) * self._scale  # [T] or [B, T]
        angles = positions[..., None] * self._speeds
        if angles.ndim == 3:
            angles = angles[:, None]
        cosines, sines = mx.cos(angles), mx.sin(angles)
        rest = width - 2 * angles.shape[-1]
        others = [mx.zeros((*angles.shape[:-1], rest))] if rest else []
        same = mx.concatenate([cosines, cosines, *(1 + zeros for zeros in others)], axis=-1)
        return same, mx.concatenate([-sines, sines, *others], axis=-1)


class _RoPE(nn.RoPE):
    """The same angles for all layers, computed once; 5 operations instead of some 20."""

    rotations: Rotations

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if x.dtype != mx.float32 or x.ndim != 4:
            return cast("mx.array", super().__call__(x, offset))
        same, crossed = self.rotations.tables(offset, (x.shape[-2], x.shape[-1]))
        half = self.dims // 2
        halves = [x[..., half : self.dims], x[..., :half]]
        if self.dims < x.shape[-1]:
            halves.append(x[..., self.dims :])
        return x * same + mx.concatenate(halves, axis=-1) * crossed


# --- attention --------------------------------------------------------------------------------

# Queries of a long chunk that are computed together, up to the keys that the last of them sees.
_QUERIES = 128


def _attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """`mlx_lm.models.base.scaled_dot_product_attention`, which on a CPU computes what it masks.

    One token's heads that share keys are one product with them, not one for each head.
    """
    whole: Callable[..., mx.array] = partial(
        scaled_dot_product_attention, cache=cache, scale=scale, sinks=sinks
    )
    if hasattr(cache, "bits") or sinks is not None:
        return whole(queries, keys, values, mask=mask)
    num_rows, num_heads, num_queries, width = queries.shape
    num_shared, num_keys = keys.shape[1:3]
    if num_queries == 1 and isinstance(mask, str):
        mask = None  # "causal" hides nothing from the last one
    if num_queries == 1 and num_heads > num_shared and _is_for_all_heads(mask):
        queries = queries.reshape(num_rows, num_shared, -1, width)
        heads = whole(queries, keys, values, mask=mask)
        return heads.reshape(num_rows, num_heads, 1, -1)
    if not (_QUERIES < num_queries <= num_keys and isinstance(mask, str)):
        return whole(queries, keys, values, mask=mask)
    parts = []
    for start in range(0, num_queries, _QUERIES):
        stop = min(start + _QUERIES, num_queries)
        seen = num_keys - num_queries + stop
        own = queries[:, :, start:stop], keys[:, :, :seen], values[:, :, :seen]
        parts.append(whole(*own, mask=mask))
    return mx.concatenate(parts, axis=2)


def _is_for_all_heads(mask: mx.array | str | None) -> bool:
    return not isinstance(mask, mx.array) or mask.ndim < 3 or mask.shape[-3] == 1


def _attends(layer: type) -> bool:
    """Whether its call attends by mlx-lm's function."""
    code = getattr(layer.__call__, "__code__", None)
    name = scaled_dot_product_attention.__name__
    if code is None or name not in code.co_names:
        return False
    return layer.__call__.__globals__.get(name) is scaled_dot_product_attention


@cache  # one for each class of layer
def _attending(layer: type) -> type:
    """A subclass of a layer that `_attends`: the same code with the function above."""
    own = layer.__call__
    names = own.__globals__ | {scaled_dot_product_attention.__name__: _attention}
    call = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    call.__kwdefaults__ = own.__kwdefaults__
    return type(layer.__name__, (layer,), {"__call__": call, "__module__": __name__})


# --- norms ------------------------------------------------------------------------------------

_MOST_FUSED = 4096  # numbers: 16 rows of 256; from there on the fused one is no faster


class _RMSNorm(nn.RMSNorm):
    """3 operations instead of 11, where those are more than what they compute."""

    share: mx.array  # 1 / D
    least: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        if x.dtype != mx.float32 or x.size > _MOST_FUSED:
            return cast("mx.array", super().__call__(x))
        total = mx.sum(mx.square(x), axis=-1, keepdims=True)
        return _scaled(x, total, self.share, self.least, self.weight)


@partial(mx.compile, shapeless=True)
def _scaled(
    x: mx.array, total: mx.array, share: mx.array, least: mx.array, weight: mx.array
) -> mx.array:
    return x * mx.rsqrt(total * share + least) * weight


# --- SwiGLU -----------------------------------------------------------------------------------

# tanh(x / 2) as x P(x²) / Q(x²), from Eigen's float32 tanh (generic_fast_tanh_float): P, Q and the
# greatest |x|, beyond which it is ±1 in float32.
_P = tuple(
    c / 2.0 ** (2 * i + 1)
    for i, c in enumerate(
        (
            *(4.89352455891786e-03, 6.37261928875436e-04, 1.48572235717979e-05),
            *(5.12229709037114e-08, -8.60467152213735e-11, 2.00018790482477e-13),
            -2.76076847742355e-16,
        )
    )
)
_Q = tuple(
    c / 2.0 ** (2 * i)
    for i, c in enumerate(
        (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)
    )
)
_MOST = 2 * 7.90531110763549805


@mx.compile
def _gated(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, of gate / 2 * (1 + tanh(gate / 2)): one kernel, which g++ vectorises.

    Not a deeper one: MLX fuses only so many operations in a row.
    """
    x = mx.minimum(mx.maximum(gate, -_MOST), _MOST)
    y = x * x
    y2 = y * y
    high = _P[4] + _P[5] * y + _P[6] * y2
    p = (_P[0] + _P[1] * y) + ((_P[2] + _P[3] * y) * y2 + high * (y2 * y2))
    q = (_Q[0] + _Q[1] * y) + (_Q[2] + _Q[3] * y) * y2
    half = (0.5 * gate) * up
    return half + (half * x * p) / q


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`mlx_lm.models.activations.swiglu`, for arrays of one shape."""
    if gate.dtype != mx.float32 or up.dtype != mx.float32 or gate.shape != up.shape:
        return cast("mx.array", swiglu(gate, up))
    width = gate.shape[-1]
    num_rows = gate.size // width
    if num_rows <= _MOST_ROWS and gate.shape[-2] == 1:
        return _gated(gate, up)
    rows = gate.reshape(-1, width), up.reshape(-1, width)
    parts = [_gated(*(array[part] for array in rows)) for part in _parts(num_rows)]
    return (parts[0] if len(parts) == 1 else mx.concatenate(parts)).reshape(gate.shape)


def _parts(num_rows: int) -> Iterator[slice]:
    """Slices of so many rows, each of a power of two: the greatest first."""
    start = 0
    while start < num_rows:
        stop = start + min(_MOST_PART_ROWS, 1 << (num_rows - start).bit_length() - 1)
        yield slice(start, stop)
        start = stop


class _Usual(nn.Module):
    """What most of mlx-lm's models have between attention and attention."""

    def __call__(self, x: Any) -> Any:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _is_swiglu(layer: type) -> bool:
    """Whether its call is the usual one: the same code, of the same names, by mlx-lm's swiglu."""
    own, usual = (getattr(cls.__call__, "__code__", None) for cls in (layer, _Usual))
    if own is None or usual is None:
        return False
    is_same = (own.co_code, own.co_names) == (usual.co_code, usual.co_names)
    return is_same and layer.__call__.__globals__.get("swiglu") is swiglu


@cache  # one for each class of layer
def _fused(layer: type) -> type:
    """A subclass of a layer that `_is_swiglu`."""

    def call(self: Any, x: mx.array) -> mx.array:
        return cast("mx.array", self.down_proj(_swiglu(self.gate_proj(x), self.up_proj(x))))

    return type(layer.__name__, (layer,), {"__call__": call, "__module__": __name__})
