"""Momentum in float32, or kept in bfloat16 by stochastic rounding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Int, PRNGKeyArray

from .._core.checks import check_adam, check_number
from .._core.context import NO_CONTEXT, MatrixContext
from .._core.keys import key_data, streams
from .._linalg.numerics import LARGEST

# The bits of a float32 that a bfloat16 does not have.
_DROPPED = 16


class RoundedTrace(NamedTuple):
    """State of `heavy_ball` in a lower precision."""

    count: Int[Array, ""]  # steps since the start or the last restart  # pyright: ignore[reportIncompatibleMethodOverride]
    trace: Any  # the momentum, a leaf (*, m, n) bfloat16


def round_stochastically(key: PRNGKeyArray, x: Float[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """One of the two bfloat16 numbers around `x`, the nearer one the more likely: its mean is `x`.

    Rounded to the nearest, a momentum would lose what is below a 512th of it, which at `β = 0.95` and steady
    gradients of one sign is where the average ends. (Gupta et al., arXiv 1502.02551.)
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # Sign and magnitude: adding to the bits moves away from zero, cutting them off moves back.
    kept = ((bits + noise) >> _DROPPED).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def heavy_ball(
    decay: Any, nesterov: bool = False, dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """`M ← β M + G,  step = M` (with `nesterov`: `β M + G`), in float32: `optax.trace` that may reject.

    Args:
      decay: `β`.
      nesterov: look ahead.
      dtype: what `M` is kept in between steps, float32 (the default) or bfloat16, which is rounded to
        stochastically; the step is made of the float32 one.

    Raises:
      TypeError, ValueError: `decay` is not a number in `[0, 1)`, or `dtype` is another.
    """
    decay = check_number("momentum", decay, at_least=0, below=1)
    kept = check_momentum_dtype(dtype)
    is_rounded = kept == jnp.bfloat16

    def init(params):
        trace = jax.tree.map(lambda x: jnp.zeros_like(x, kept), params)
        return RoundedTrace(jnp.zeros((), jnp.int32), trace) if is_rounded else optax.TraceState(trace)

    def rounded(momentum, count):
        leaves, treedef = jax.tree.flatten(momentum)
        # Any seed: the noise has only to differ from leaf to leaf and from step to step.
        keys = streams(key_data(0), count, len(leaves))
        return treedef.unflatten(map(round_stochastically, keys, leaves))

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del params, extra_args

        def ahead(momentum):
            return jax.tree.map(
                lambda m, g: decay * m.astype(jnp.float32) + g.astype(jnp.float32), momentum, updates
            )

        momentum = ahead(state.trace)
        trace = rounded(momentum, state.count) if is_rounded else momentum
        if context.accept is not None:
            trace = context.accept.keep_if_rejected(trace, state.trace)
        if is_rounded:
            state = state._replace(count=optax.safe_increment(state.count))
        else:
            momentum = trace  # one array, so that no second one is held
        state = state._replace(trace=trace)
        return ahead(momentum) if nesterov else momentum, state

    return optax.GradientTransformationExtraArgs(init, update)


def adam(b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, which may reject a step, with its state and defaults.

        M ← b1 M + (1 - b1) G,   V ← b2 V + (1 - b2) G²,   step = M/(1 - b1ᵗ) / (√(V/(1 - b2ᵗ)) + eps)

    The step is made of the moments that are stored. Otherwise XLA's CPU backend computes it out of the old
    ones, and copies those for it.
    """
    plain = optax.scale_by_adam(b1, b2, eps)

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del extra_args
        if (accept := context.accept) is None:
            return plain.update(updates, state, params)
        # Of a wider or narrower gradient than the parameters it was made for, the state keeps its own dtype.
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


def average(decay: Any) -> optax.GradientTransformationExtraArgs:
    """`M ← β M + (1 - β) G,  step = M`: `optax.ema` without bias correction, which may reject a step."""
    plain = optax.ema(decay, debias=False, accumulator_dtype=jnp.float32)

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del extra_args
        if (accept := context.accept) is None:
            return plain.update(updates, state, params)
        moment = optax.tree.update_moment(updates, state.ema, decay, 1)
        ema = accept.keep_if_rejected(optax.tree.cast(moment, jnp.float32), state.ema)
        return ema, optax.EmaState(optax.safe_increment(state.count), ema)

    return optax.GradientTransformationExtraArgs(plain.init, update)


def check_momentum_dtype(dtype: Any) -> Any:
    """float32, or bfloat16 where it is asked for.

    Raises:
      ValueError: any other.
    """
    try:
        found = jnp.dtype(jnp.float32 if dtype is None else dtype)
    except TypeError:
        found = None
    if found not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"momentum_dtype must be float32 or bfloat16, got {dtype!r}.")
    return found


def scale_by_clipped_adam(b1: Any, b2: Any, eps: Any) -> optax.GradientTransformationExtraArgs:
    """Adam's rule, of gradients up to 1e15: an infinite square would stop it for good.

    Args:
      b1, b2, eps: Adam's.

    Raises:
      TypeError, ValueError: one of them is out of range or of the wrong type.
    """
    return optax.chain(optax.clip(LARGEST), adam(*check_adam(b1, b2, eps)))
