"""Normalize each matrix of a tree."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

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
    map_leaves = functools.partial(jax.tree.map, _in_float32(method))
    return _stateless(map_leaves, map_leaves)


def normalize_lean(method: Callable[[Sequence[Array]], list[Array]]) -> optax.GradientTransformation:
    """`normalize` of matrices by a method of several stacks that makes no others: `sinkhorn_together`.

    On a GPU a few leaves go through `method` at once. Elsewhere each goes as it comes: waiting would only
    copy its gradient.
    """
    of_stacks = _in_float32(method)
    return _stateless(
        functools.partial(map_lean, of_stacks), functools.partial(jax.tree.map, lambda g: of_stacks([g])[0])
    )


def normalize_sequentially(method: Normalizer) -> optax.GradientTransformation:
    """`normalize` of matrices, one leaf after the other, so that memory holds the temporary matrices of one
    leaf only; on a GPU of a few leaves.
    """
    of_stack = _in_float32(method)
    return _stateless(
        functools.partial(map_matrices, of_stack), functools.partial(map_sequentially, of_stack)
    )


def _in_float32(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda g: method(jax.tree.map(lambda x: x.astype(jnp.float32), g))


def _stateless(
    map_leaves: Callable[[Any], Any], map_sharded: Callable[[Any], Any]
) -> optax.GradientTransformationExtraArgs:
    """Map the leaves; sharded ones are not stacked, for their shardings may differ."""

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del state, params, extra_args
        if context.turn.is_probe:
            return updates, optax.EmptyState()
        is_sharded = any(view.sharding for view in jax.tree.leaves(context.views))
        return (map_sharded if is_sharded else map_leaves)(updates), optax.EmptyState()

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
