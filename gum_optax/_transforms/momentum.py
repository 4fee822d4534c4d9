"""Momentum in float32, or stored in bfloat16 with stochastic rounding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Int, PRNGKeyArray

from .._core.checks import check_adam, check_number
from .._core.context import NO_CONTEXT, MatrixContext
from .._core.keys import RowKey, bits16, key_data
from .._linalg.numerics import LARGEST
from .._linalg.rounding import round_by


class RoundedTrace(NamedTuple):
    """State of `trace` in bfloat16."""

    count: Int[Array, ""]  # steps since the start or the last restart  # pyright: ignore[reportIncompatibleMethodOverride]
    trace: optax.Updates  # the momentum, each leaf (*, m, n) bfloat16


def round_stochastically(key: PRNGKeyArray | RowKey, x: Float[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """Round to one of the two bfloat16 numbers around `x`, so that the mean of the result is `x`.

    Rounding to nearest would lose every change below a 512th of the momentum. An average at `β = 0.95` of
    steady gradients of one sign ends there. (Gupta et al., arXiv 1502.02551.)
    """
    return round_by(bits16(key, x.shape), x, jnp.bfloat16)


def trace(decay: Any, nesterov: bool = False, dtype: Any = None) -> optax.GradientTransformationExtraArgs:
    """`M ← β M + G,  step = M` (with `nesterov`: `β M + G`), in float32. It may reject a step.

    Args:
      decay: `β`.
      nesterov: whether to look ahead.
      dtype: the dtype of `M` between steps, float32 (the default) or bfloat16 with stochastic rounding. The
        step comes from the float32 `M`, before rounding.

    Raises:
      TypeError, ValueError: `decay` is not a number in `[0, 1)`, or `dtype` is neither float32 nor bfloat16.
    """
    decay = check_number("momentum", decay, at_least=0, below=1)
    stored_dtype = check_momentum_dtype(dtype)
    is_rounded = stored_dtype == jnp.bfloat16

    def init(params):
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, stored_dtype), params)
        return RoundedTrace(jnp.zeros((), jnp.int32), zeros) if is_rounded else optax.TraceState(zeros)

    def rounded(momentum, count, turn):
        leaves, treedef = jax.tree.flatten(momentum)
        # Any seed will do: the noise only has to differ between leaves and between steps.
        keys = map(turn.row_key, turn.keys(momentum, key_data(0), count))
        return treedef.unflatten(map(round_stochastically, keys, leaves))

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del params, extra_args

        def ahead(momentum):
            return jax.tree.map(
                lambda m, g: decay * m.astype(jnp.float32) + g.astype(jnp.float32), momentum, updates
            )

        momentum = ahead(state.trace)
        stored = rounded(momentum, state.count, context.turn) if is_rounded else momentum
        if context.accept is not None:
            stored = context.accept.keep_if_rejected(stored, state.trace)
        if is_rounded:
            state = state._replace(count=optax.safe_increment(state.count))
        else:
            momentum = stored  # use the stored array, so that memory holds only one
        state = state._replace(trace=stored)
        return ahead(momentum) if nesterov else momentum, state

    return optax.GradientTransformationExtraArgs(init, update)


def adam(b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, which may reject a step, with its state and defaults.

        M ← b1 M + (1 - b1) G,   V ← b2 V + (1 - b2) G²,   step = M/(1 - b1ᵗ) / (√(V/(1 - b2ᵗ)) + eps)

    The step reads the new, stored moments. Otherwise XLA's CPU backend would compute the step from the old
    moments, and copy those for it.
    """
    plain = optax.scale_by_adam(b1, b2, eps)

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del extra_args
        if (accept := context.accept) is None:
            return plain.update(updates, state, params)
        # The state keeps its dtype, even if the gradient is wider or narrower than the parameters at `init`.
        updates = jax.tree.map(
            lambda g, m: g.astype(jnp.promote_types(m.dtype, jnp.float32)), updates, state.mu
        )
        count = optax.safe_increment(state.count)
        mu = accept.keep_if_rejected(optax.tree.update_moment(updates, state.mu, b1, 1), state.mu)
        nu = accept.keep_if_rejected(
            optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2), state.nu
        )
        means = optax.tree.bias_correction(mu, b1, count)
        squares = optax.tree.bias_correction(nu, b2, count)
        steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), means, squares)
        return steps, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(plain.init, update)


def ema(decay: Any) -> optax.GradientTransformationExtraArgs:
    """`M ← β M + (1 - β) G,  step = M`, `optax.ema` that may reject a step."""
    plain = optax.ema(decay, debias=False, accumulator_dtype=jnp.float32)

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del extra_args
        if (accept := context.accept) is None:
            return plain.update(updates, state, params)
        moment = optax.tree.update_moment(updates, state.ema, decay, 1)
        stored = accept.keep_if_rejected(optax.tree.cast(moment, jnp.float32), state.ema)
        return stored, optax.EmaState(optax.safe_increment(state.count), stored)

    return optax.GradientTransformationExtraArgs(plain.init, update)


def check_momentum_dtype(dtype: Any) -> Any:
    """The dtype of a stored momentum: float32 by default, or bfloat16.

    Raises:
      ValueError: `dtype` is neither.
    """
    try:
        stored_dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    except TypeError:
        stored_dtype = None
    if stored_dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"momentum_dtype must be float32 or bfloat16, got {dtype!r}.")
    return stored_dtype


def scale_by_clipped_adam(b1: Any, b2: Any, eps: Any) -> optax.GradientTransformationExtraArgs:
    """Adam's rule for gradients clipped to 1e15: an infinite square would stop the rule for good.

    Args:
      b1, b2, eps: Adam's.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type.
    """
    return optax.chain(optax.clip(LARGEST), adam(*check_adam(b1, b2, eps)))
