"""How a momentum is stored between steps: in float32, in bfloat16, or in eight bits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Bool, Float, Int, PRNGKeyArray, UInt16, UInt32

from .._core.checks import check_dtype
from .._core.context import MatrixContext
from .._core.keys import RowKey, key_data, of_leaf, typed
from .._core.trees import columns
from .._core.turns import WholeStep
from .._core.xla import if_needed, unstacked
from .._linalg.numerics import exact_matmul
from .._linalg.quantize import dequantize, quantize, scales_shape
from .._linalg.rounding import noise_of_rows, round_by
from .._mesh.explicit import zeros


class RoundedTrace(NamedTuple):
    """State of `trace` in bfloat16."""

    count: Int[Array, ""]  # steps since the start or the last restart  # pyright: ignore[reportIncompatibleMethodOverride]
    trace: optax.Updates  # the momentum, each leaf (*, m, n) bfloat16


class QuantizedTrace(NamedTuple):
    """State of `trace` in eight bits: a number is its code times the scale of its block."""

    count: Int[Array, ""]  # steps since the start or the last restart  # pyright: ignore[reportIncompatibleMethodOverride]
    trace: optax.Updates  # codes of the momentum, each leaf (*, m, n) int8
    trace_scales: optax.Updates  # each leaf (*, m, ceil(n / 128)) float32

    def rotated(self, is_refresh: Bool[Array, ""], rotation: Any) -> "QuantizedTrace":
        """The momentum from the left times a rotation of each leaf, at a refresh."""

        def rotated_codes(q, *stored):
            return requantize(
                is_refresh, lambda q, old: exact_matmul(q, dequantize(old[0], old[1])), q, stored
            )

        rows = jax.tree.map(rotated_codes, rotation, self.trace, self.trace_scales)
        codes, scales = columns(rotation, rows, 2)
        return self._replace(trace=codes, trace_scales=scales)


def requantize(
    is_needed: Bool[Array, ""],
    make: Callable[[Any, tuple[Array, ...]], Array],
    x: Array,
    stored: tuple[Array, ...],
    axis: int = -1,
) -> tuple[Array, Array]:
    """Codes and scales of `make(x, stored)`, rounded to nearest; the stored ones unless it is needed."""

    def made(x, stored):
        new = quantize(make(x, stored), axis=axis)
        return jax.tree.map(functools.partial(jnp.where, is_needed), new, stored)

    return if_needed(is_needed, made, x, stored)


class Storage(Protocol):
    """A way to store a momentum. Each method takes or returns the state of `trace`."""

    def init(self, params: Any) -> Any:
        """The state of no momentum."""
        ...

    def load(self, state: Any) -> Any:
        """The momentum in float32."""
        ...

    def store(self, momentum: Any, state: Any, context: MatrixContext) -> tuple[Any, Any]:
        """The momentum that the step reads, and the state; a leaf that rejects its step keeps its state."""
        ...


class _Exact:
    """In float32."""

    def init(self, params: Any) -> Any:
        return optax.TraceState(_zeros(params, jnp.float32))

    def load(self, state: Any) -> Any:
        return state.trace

    def store(self, momentum: Any, state: Any, context: MatrixContext) -> tuple[Any, Any]:
        stored = _kept(context, momentum, state.trace)
        return stored, optax.TraceState(stored)  # the step reads the stored array: memory holds only one


class _Rounded:
    """In bfloat16, rounded stochastically; the step reads the momentum before rounding."""

    def init(self, params: Any) -> Any:
        return RoundedTrace(jnp.zeros((), jnp.int32), _zeros(params, jnp.bfloat16))

    def load(self, state: Any) -> Any:
        return jax.tree.map(lambda m: m.astype(jnp.float32), state.trace)

    def store(self, momentum: Any, state: Any, context: MatrixContext) -> tuple[Any, Any]:
        keys = keys_of(momentum, state.count, context.turn)
        rounded = jax.tree.map(lambda m, key: round_stochastically(key, m), momentum, keys)
        stored = _kept(context, rounded, state.trace)
        return momentum, RoundedTrace(_next(state), stored)


class _Quantized:
    """In eight bits with a scale for 128 numbers of a row, rounded stochastically."""

    def init(self, params: Any) -> Any:
        scales = jax.tree.map(scales_beside, params)
        return QuantizedTrace(jnp.zeros((), jnp.int32), _zeros(params, jnp.int8), scales)

    def load(self, state: Any) -> Any:
        return jax.tree.map(dequantize, state.trace, state.trace_scales)

    def store(self, momentum: Any, state: Any, context: MatrixContext) -> tuple[Any, Any]:
        keys = keys_of(momentum, state.count, context.turn)
        pairs = jax.tree.map(lambda m, key: quantize(m, noise_of(key, m.shape)), momentum, keys)
        codes, scales = columns(momentum, pairs, 2)
        codes, scales = _kept(context, codes, state.trace), _kept(context, scales, state.trace_scales)
        new = QuantizedTrace(_next(state), codes, scales)
        return self.load(new), new


_STORAGES: dict[str, Storage] = {"float32": _Exact(), "bfloat16": _Rounded(), "int8": _Quantized()}


def storage_of(dtype: Any) -> Storage:
    """The storage of a `momentum_dtype`; `None` is float32.

    Raises:
      ValueError: `dtype` is none of float32, bfloat16 and int8.
    """
    return check_dtype("momentum_dtype", dtype, _STORAGES)


def scales_beside(x: Float[Array, "*shape"]) -> Float[Array, "*blocks"]:
    """Scales of zeros in eight bits."""
    if x.ndim < 2:
        return jnp.zeros(scales_shape(x.shape), jnp.float32)
    return zeros(x, -2, scales_shape(x.shape)[-1])


def round_stochastically(key: PRNGKeyArray | RowKey, x: Float[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """Round to one of the two bfloat16 numbers around `x`, so that the mean of the result is `x`.

    Rounding to nearest would lose every change below a 512th of the momentum. An average at `β = 0.95` of
    steady gradients of one sign ends there. (Gupta et al., arXiv 1502.02551.)
    """
    return round_by(noise_of(key, x.shape), x, jnp.bfloat16)


def noise_of(key: PRNGKeyArray | RowKey, shape: tuple[int, ...]) -> UInt16[Array, "..."]:
    """The noise of a leaf, or of one row of it."""
    of_layers = shape if len(shape) > 1 else (1, *shape)
    first = key.row if isinstance(key, RowKey) else 0
    return noise_of_rows(of_leaf(key), first, of_layers).reshape(shape)


def _zeros(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype), tree)


def _next(state: Any) -> Array:
    return jnp.asarray(optax.safe_increment(state.count))


def _kept(context: MatrixContext, new: Any, old: Any) -> Any:
    return new if context.accept is None else context.accept.keep_if_rejected(new, old)


def keys_of(tree: Any, count: Any, turn: WholeStep, seed: int = 0) -> Any:
    """A key for the noise of each leaf in one step, or of one row of it."""
    # Any seed will do: the noise only has to differ between leaves and between steps.
    return jax.tree.map(turn.row_key, keys_of_leaves(tree, key_data(seed), count, turn))


def keys_of_leaves(tree: Any, key: UInt32[Array, "2"], step: Any, turn: WholeStep) -> Any:
    """A key for each leaf in one step."""
    keys = jax.random.key_data(turn.keys(tree, key, step))
    return jax.tree.structure(tree).unflatten([typed(data) for (data,) in unstacked(keys)])
