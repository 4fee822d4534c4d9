"""Builds a rule from two functions of one stack of matrices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.batches import map_sequentially
from .._core.checks import check_matrix_leaf
from .._core.context import NO_CONTEXT, MatrixContext
from .._core.keys import check_key, key_data, stream


def per_matrix(
    state_class: Callable[..., Any],
    init: Callable[..., tuple[Any, ...]],
    update: Callable[..., tuple[Any, ...]],
    key: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that updates the leaves independently, one after the other.

    Args:
      state_class: a NamedTuple with `count`, the number of steps, then one field per array of a leaf's state.
      init: `(key, leaf) -> arrays`; every leaf gets its own key.
      update: `(count, gradient, *arrays) -> (step, *arrays)`; `count` is 1 on the first step.
      key: an integer seed or a JAX key.
    """
    check_key(key)

    width = len(state_class._fields) - 1  # pyright: ignore[reportFunctionMemberAccess]

    def as_state(count, rows, treedef):
        """The state of rows, each of which holds the arrays of one leaf."""
        return state_class(count, *(treedef.unflatten([row[i] for row in rows]) for i in range(width)))

    def init_all(params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            check_matrix_leaf(path, leaf)
        data = key_data(key)
        leaves, treedef = jax.tree.flatten(params)
        rows = [init(stream(data, jnp.int32(0), leaf_index), x) for leaf_index, x in enumerate(leaves)]
        return as_state(jnp.zeros((), jnp.int32), rows, treedef)

    def update_all(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del params, extra_args
        accept = context.accept
        if context.turn.is_probe:
            return updates, state
        count, *arrays = state
        count = jnp.asarray(optax.safe_increment(count))

        def update_leaf(*arrays_and_gradient):
            # The gradient is last, because `map_sequentially` delays the last operand. Every rule first adds
            # the gradient to its momentum, and that sum absorbs the delay.
            is_accepted, *old, g = arrays_and_gradient
            step, *new = update(count, g.astype(jnp.float32), *old)
            return step, new if accept is None else accept.keep_leaf_if_rejected(is_accepted, new, old)

        leaves, treedef = jax.tree.flatten(updates)
        accepted = [True] * len(leaves) if accept is None else accept.of_leaves(updates)
        columns = [treedef.flatten_up_to(array) for array in arrays]
        results = map_sequentially(update_leaf, accepted, *columns, leaves)
        steps = treedef.unflatten([step for step, _ in results])
        return steps, as_state(count, [row for _, row in results], treedef)

    return optax.GradientTransformationExtraArgs(init_all, update_all)  # pyright: ignore[reportArgumentType]
