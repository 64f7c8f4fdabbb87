"""Faster forms of a network's float32 layers on a CPU. A GPU needs none of them.

There MLX composes norms and rotations of a dozen small operations each, computes one exponential at
a time, and attention scores also where they are masked; its queue is shorter than a step; OpenBLAS
copies a whole matrix to multiply it with a few rows. `optimize_for_cpu` changes the class of layers
of one network, and nothing of mlx or mlx-lm. Only the composition root may call it.

With the BLAS that comes with MLX all forms but SwiGLU give the same bits as MLX's (tested); SwiGLU
is within 3e-7 of the exact value, relative to the gate or to 1, whichever is larger (tested).
"""

import ctypes
import logging
import math
import shutil
from functools import cache, lru_cache, partial
from itertools import accumulate, pairwise
from types import FunctionType
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import scaled_dot_product_attention


def optimize_for_cpu(network: nn.Module) -> None:
    """Give the layers of a loaded network their CPU forms, in place; call it once.

    Its parameters stay, and must not be replaced later. On a GPU and without g++ nothing is done.
    """
    if mx.default_device().type != mx.cpu or not _has_compiler():
        return
    has_small_products = _blas_core() in _CORES_WITH_SMALL_PRODUCTS
    for layer in network.modules():
        own: Any = type(layer)
        if own is nn.RoPE and not layer.traditional:
            half = layer.dims // 2
            steps = mx.arange(0, -half, -1, dtype=mx.float32)
            speeds = mx.exp(steps * mx.array(math.log(layer.base) / half, mx.float32))
            _set(layer, _RoPE, speeds=speeds, factor=mx.array(layer.scale, mx.float32))
        elif own is nn.RMSNorm and layer.weight.dtype == mx.float32:
            share = mx.array(1.0 / layer.weight.size, mx.float32)
            _set(layer, _RMSNorm, share=share, least=mx.array(layer.eps, mx.float32))
        elif own in _SPLIT and has_small_products and layer.weight.dtype == mx.float32:
            if "bias" not in layer and _part_width(_FEW_ROWS, *layer.weight.shape) is not None:
                _set(layer, _SPLIT[own], views={})
        else:
            layer.__class__ = _with_functions(own)
    for layer in (*getattr(network, "layers", ()), network):
        if isinstance(layer, nn.Module):
            layer.__class__ = _dispatched(layer.__class__)


def disable_compile_without_compiler() -> None:
    """Turn MLX's fused kernels off on a CPU without g++, where each of them would fail."""
    if mx.default_device().type == mx.cpu and not _has_compiler():
        logging.getLogger("mlxlite.model").info("no g++ on this machine: fused kernels are off")
        mx.disable_compile()


def _has_compiler() -> bool:
    return shutil.which("g++") is not None  # MLX calls it at run time


def _set(layer: nn.Module, form: type, **attributes: Any) -> None:
    """Change a layer's class. What the form needs is no parameter of the network."""
    layer.__class__ = form
    for name, value in attributes.items():
        object.__setattr__(layer, name, value)


def _subclass(layer: type, **attributes: Any) -> type:
    return type(layer.__name__, (layer,), {"__module__": __name__, **attributes})


@cache
def _with_functions(layer: type) -> type:
    """A subclass whose `__call__` is the same code with this module's functions for mlx-lm's."""
    own: Any = layer.__call__
    names = own.__code__.co_names if isinstance(own, FunctionType) else ()
    ours = {
        name: form
        for name, (theirs, form) in _FUNCTIONS.items()
        if name in names and own.__globals__.get(name) is theirs
    }
    if not ours:
        return layer
    scope = own.__globals__ | ours
    call = FunctionType(own.__code__, scope, own.__name__, own.__defaults__, own.__closure__)
    call.__kwdefaults__ = own.__kwdefaults__
    return _subclass(layer, __call__=call)


@cache
def _dispatched(layer: type) -> type:
    """A subclass whose output for single tokens is computed while the next layer is built."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = layer.__call__(self, *args, **kwargs)
        if isinstance(output, mx.array) and output.shape[-2] == 1:
            mx.async_eval(output)
        return output

    return _subclass(layer, __call__=call)


# For these cores OpenBLAS has kernels for small products, which read a matrix in place.
_CORES_WITH_SMALL_PRODUCTS = ("SkylakeX", "Cooperlake", "SapphireRapids")
# Its bounds of a small product: all three sizes multiplied, and the size of its output.
_MAX_WORK, _MAX_OUTPUTS = 1_000_000, 1024
_MIN_WIDTH, _FEW_ROWS = 16, 8  # a matrix whose product with so few rows is small stays whole


def _blas_core() -> str | None:
    """The processor for which a preloaded OpenBLAS has chosen kernels; None with another BLAS."""
    name = getattr(ctypes.CDLL(None), "openblas_get_corename", None)
    if name is None:
        return None
    name.restype = ctypes.c_char_p
    return str(name().decode())


@lru_cache(maxsize=4096)
def _part_width(num_rows: int, num_outputs: int, num_inputs: int) -> int | None:
    """Outputs of a part, a power of two; None where the whole is small, or no part would be."""
    size = num_rows * num_outputs
    if size <= _MAX_OUTPUTS and size * num_inputs <= _MAX_WORK:
        return None
    most = min(_MAX_OUTPUTS, _MAX_WORK // num_inputs) // num_rows
    width = min(1 << most.bit_length() >> 1, num_outputs & -num_outputs)
    return width if width >= _MIN_WIDTH else None


def _product(self: Any, x: mx.array) -> Any:
    """x @ weight.T for x `[..., K]`, by parts of the weight `[N, K]` that are small products.

    `views` has the parts by their width, `[N / width, K, width]`; they share the weight's memory.
    """
    weight = self.weight
    num_rows = x.size // weight.shape[1]
    width = _part_width(num_rows, *weight.shape)
    if width is None:
        return x @ weight.T
    if width not in self.views:
        self.views[width] = weight.reshape(-1, width, weight.shape[1]).swapaxes(1, 2)
        mx.eval(self.views[width])
    y = x.reshape(1, num_rows, -1) @ self.views[width]  # [N / width, rows, width]
    if num_rows > 1:
        y = y.swapaxes(0, 1)
    return y.reshape(*x.shape[:-1], weight.shape[0])


_SPLIT = {
    nn.Linear: _subclass(nn.Linear, __call__=_product),
    nn.Embedding: _subclass(nn.Embedding, as_linear=_product),
}


class _RoPE(nn.RoPE):
    """3 operations instead of some 20, for single tokens. `speeds` `[D / 2]` are in radians."""

    def __call__(self: Any, x: mx.array, offset: int | mx.array = 0) -> Any:
        if x.dtype != mx.float32 or x.shape[2:] != (1, self.dims):
            return nn.RoPE.__call__(self, x, offset)
        return _rotated(x, mx.array(offset).reshape(-1, 1, 1, 1), self.factor, self.speeds)


@mx.compile
def _rotated(x: mx.array, position: mx.array, factor: mx.array, speeds: mx.array) -> mx.array:
    angles = (position * factor) * speeds
    cosines, sines = mx.cos(angles), mx.sin(angles)
    x1, x2 = x[..., : speeds.size], x[..., speeds.size :]
    return mx.concatenate([x1 * cosines - x2 * sines, x1 * sines + x2 * cosines], axis=-1)


class _RMSNorm(nn.RMSNorm):
    """3 operations instead of 11. `share` is 1 / D."""

    def __call__(self: Any, x: mx.array) -> Any:
        if x.dtype != mx.float32 or x.size > _MAX_FUSED_SIZE:
            return nn.RMSNorm.__call__(self, x)
        total = mx.sum(mx.square(x), axis=-1, keepdims=True)
        return _scaled(x, total, self.share, self.least, self.weight)


_MAX_FUSED_SIZE = 4096  # numbers, as 16 rows of 256: beyond it the fused form is no faster


@partial(mx.compile, shapeless=True)
def _scaled(x: Any, total: Any, share: Any, least: Any, weight: Any) -> Any:
    return x * mx.rsqrt(total * share + least) * weight


_NUM_QUERIES = 128  # of a chunk that are computed together, up to the keys that the last one sees


def _attention(q: mx.array, k: Any, v: Any, cache: Any, scale: Any, mask: Any, **more: Any) -> Any:
    """mlx-lm's function, without most of the scores that a causal mask hides.

    OpenBLAS sums a product of more than some 300 inner terms in two parts: with it preloaded, the
    weighted values of more keys differ in their last bit, for fewer keys are split elsewhere.
    """
    whole = partial(scaled_dot_product_attention, cache=cache, scale=scale, mask=mask, **more)
    num_queries = q.shape[2]
    is_causal = isinstance(mask, str) and not hasattr(cache, "bits")
    if not is_causal or not _NUM_QUERIES < num_queries <= k.shape[2]:
        return whole(q, k, v)
    parts = []
    for start, stop in pairwise([*range(0, num_queries, _NUM_QUERIES), num_queries]):
        seen = k.shape[2] - num_queries + stop
        parts.append(whole(q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen]))
    return mx.concatenate(parts, axis=2)


# tanh(x / 2) = x P(x²) / Q(x²) in float32, after Eigen's generic_fast_tanh_float, and the greatest
# |x| below which it is not ±1.
_P = (
    *(2.446762279e-03, 7.965774111e-05, 4.642882366e-07, 4.001794602e-10),
    *(-1.680599907e-13, 9.766542504e-17, -3.370078708e-20),
)
_Q = 4.893525186e-03, 5.671086581e-04, 7.408419105e-06, 1.872278742e-08
_MAX_TANH = 15.81062221527099
_MAX_ROWS = 32  # more rows go in parts of 1, 2, 4, … rows: each shape is traced once


@mx.compile
def _gated(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up = gate / 2 * (1 + tanh(gate / 2)) * up: one kernel, which g++ vectorises."""
    x = mx.minimum(mx.maximum(gate, -_MAX_TANH), _MAX_TANH)
    y = x * x
    y2 = y * y
    high = _P[4] + _P[5] * y + _P[6] * y2
    p = (_P[0] + _P[1] * y) + ((_P[2] + _P[3] * y) * y2 + high * (y2 * y2))
    q = (_Q[0] + _Q[1] * y) + (_Q[2] + _Q[3] * y) * y2
    half = (0.5 * gate) * up
    return half + (half * x * p) / q


def _swiglu(gate: mx.array, up: mx.array) -> Any:
    if gate.dtype != mx.float32 or up.dtype != mx.float32 or gate.shape != up.shape:
        return swiglu(gate, up)
    num_rows = gate.size // gate.shape[-1]
    if num_rows <= _MAX_ROWS:
        return _gated(gate, up)
    sizes = [1 << i for i in range(num_rows.bit_length()) if num_rows >> i & 1]
    rows = [mx.split(x.reshape(num_rows, -1), list(accumulate(sizes))[:-1]) for x in (gate, up)]
    return mx.concatenate(list(map(_gated, *rows))).reshape(gate.shape)


_FUNCTIONS: dict[str, tuple[Any, Any]] = {  # by name: mlx-lm's and ours
    "scaled_dot_product_attention": (scaled_dot_product_attention, _attention),
    "swiglu": (swiglu, _swiglu),
}
