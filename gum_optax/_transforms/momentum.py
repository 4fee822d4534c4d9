"""Momentum and Adam's moments, by rules that may reject a step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.checks import check_adam, check_number
from .._core.context import NO_CONTEXT, MatrixContext
from .._linalg.numerics import LARGEST, wide_dtype
from .storage import storage_of


def trace(decay: Any, nesterov: bool = False, dtype: Any = None) -> optax.GradientTransformationExtraArgs:
    """`M ← β M + G,  step = M` (with `nesterov`: `β M + G`), in float32. It may reject a step.

    Args:
      decay: `β`.
      nesterov: whether to look ahead.
      dtype: the dtype of `M` between steps: float32 (the default), or bfloat16 or int8 with stochastic
        rounding. The step comes from the float32 `M`, before rounding.

    Raises:
      TypeError, ValueError: `decay` is not a number in `[0, 1)`, or `dtype` is none of these.
    """
    decay = check_number("momentum", decay, at_least=0, below=1)
    storage = storage_of(dtype)

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del params, extra_args

        def decayed_plus_gradient(momentum):
            return jax.tree.map(lambda m, g: decay * m + g.astype(jnp.float32), momentum, updates)

        momentum, state = storage.store(decayed_plus_gradient(storage.load(state)), state, context)
        return decayed_plus_gradient(momentum) if nesterov else momentum, state

    return optax.GradientTransformationExtraArgs(storage.init, update)


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
        updates = jax.tree.map(lambda g, m: g.astype(wide_dtype(m)), updates, state.mu)
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


def scale_by_clipped_adam(b1: Any, b2: Any, eps: Any) -> optax.GradientTransformationExtraArgs:
    """Adam's rule for gradients clipped to 1e15: an infinite square would stop the rule for good.

    Args:
      b1, b2, eps: Adam's.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type.
    """
    return optax.chain(optax.clip(LARGEST), adam(*check_adam(b1, b2, eps)))
