"""Momentum in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._checks import check_number
from ._guard import Guard


def heavy_ball(decay: Any, nesterov: bool = False) -> optax.GradientTransformationExtraArgs:
    """`M ← β M + G,  step = M` (with `nesterov`: `β M + G`), in float32: `optax.trace` under a guard.

    Args:
      decay: `β`.
      nesterov: look ahead.

    Raises:
      TypeError, ValueError: `decay` is not a number in `[0, 1)`.
    """
    check_number("momentum", decay, at_least=0, below=1)

    def init(params):
        return optax.TraceState(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params))

    def update(updates, state, params=None, *, guard: Guard | None = None, **extra_args):
        del params, extra_args

        def ahead(momentum):
            return jax.tree.map(lambda m, g: decay * m + g, momentum, updates)

        momentum = ahead(state.trace)
        if guard is not None:
            momentum = guard.keep(momentum, state.trace)
        return ahead(momentum) if nesterov else momentum, optax.TraceState(momentum)

    return optax.GradientTransformationExtraArgs(init, update)
