"""Normalize each matrix of a tree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.checks import check_function
from .._core.context import NO_CONTEXT, MatrixContext
from .._core.xla import map_sequentially
from .._linalg.normalizers import Normalizer


def normalize(method: Normalizer) -> optax.GradientTransformation:
    """Replace each matrix by its normalized form: `step = method(g)`, without state.

    The computation is in float32. Rows without their mean have a null space, and in bfloat16 whitening would
    fill the null space with rounding errors.

    Args:
      method: `sinkhorn`, `standardize_rows`, a `multi_norm`, or any function `(*, m, n) -> (*, m, n)`.

    Raises:
      TypeError: `method` is not a function.
    """
    check_function("method", method, "gum_optax.sinkhorn")
    return _stateless(jax.tree.map, method)


def normalize_sequentially(method: Normalizer) -> optax.GradientTransformation:
    """`normalize`, one leaf after the other, so that memory holds the temporary matrices of one leaf only.

    It is for methods with temporary matrices. `sinkhorn` has none: waiting would only copy its gradients.
    """
    return _stateless(map_sequentially, method)


def _stateless(map_leaves: Callable[..., Any], method: Normalizer) -> optax.GradientTransformation:
    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del params, extra_args
        if context.turn.is_probe:
            return updates, state
        return map_leaves(lambda g: method(g.astype(jnp.float32)), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
