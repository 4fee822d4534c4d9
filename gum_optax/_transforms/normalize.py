"""Normalize each matrix of a tree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.batches import map_lean, map_matrices, map_sequentially
from .._core.checks import check_function
from .._core.context import NO_CONTEXT, MatrixContext
from .._linalg.normalizers import Normalizer


def normalize(method: Normalizer) -> optax.GradientTransformation:
    """Replace each matrix by its normalized form: `step = method(g)`, without state.

    The computation is in float32. Rows without their mean have a null space, and in bfloat16 whitening would
    fill the null space with rounding errors.

    Args:
      method: `sinkhorn`, `standardize_rows`, a `multi_norm`, or any function `(*, m, n) -> (*, m, n)`.

    Raises:
      TypeError: `method` is not a function.

    Examples:
      >>> gradients = {"kernel": jnp.diag(jnp.array([4.0, -3.0, 2.0, -1.0]))}
      >>> rule = gum_optax.normalize(gum_optax.unit_rows)
      >>> steps, state = rule.update(gradients, rule.init(gradients))
      >>> print(np.diagonal(steps["kernel"]).round(3))  # each row has norm √4
      [ 2. -2.  2. -2.]
    """
    check_function("method", method, "gum_optax.sinkhorn")
    return _stateless(method, jax.tree.map, jax.tree.map)


def normalize_lean(method: Normalizer) -> optax.GradientTransformation:
    """`normalize` of matrices by a method that makes no others, such as `sinkhorn`.

    On a GPU a few leaves go through `method` as one stack. Elsewhere each goes as it comes: waiting would
    only copy its gradient.
    """
    return _stateless(method, map_lean, jax.tree.map)


def normalize_sequentially(method: Normalizer) -> optax.GradientTransformation:
    """`normalize` of matrices, one leaf after the other, so that memory holds the temporary matrices of one
    leaf only; on a GPU of a few leaves.
    """
    return _stateless(method, map_matrices, map_sequentially)


def _stateless(
    method: Normalizer, map_leaves: Callable[..., Any], map_sharded: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """Map the leaves; sharded ones are not stacked, for their shardings may differ."""

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del state, params, extra_args
        if context.turn.is_probe:
            return updates, optax.EmptyState()
        is_sharded = any(view.sharding for view in jax.tree.leaves(context.views))
        map_all = map_sharded if is_sharded else map_leaves
        return map_all(lambda g: method(g.astype(jnp.float32)), updates), optax.EmptyState()

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
