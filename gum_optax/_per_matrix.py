"""A rule from two functions of one stack of matrices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._checks import check_matrix_leaf
from ._sampling import check_key, key_data, stream
from ._trees import map_with_place


def per_matrix(
    kind: Callable[..., Any],
    init: Callable[..., tuple[Any, ...]],
    update: Callable[..., tuple[Any, ...]],
    key: Any = 0,
) -> optax.GradientTransformation:
    """A transformation that treats every leaf by itself.

    Args:
      kind: a NamedTuple: `count`, the steps taken, then one field for each array of a leaf's state.
      init: `(key, leaf) -> arrays`, with a key of the leaf's own.
      update: `(count, gradient, *arrays) -> (step, *arrays)`; `count` is 1 on the first step.
      key: an integer seed or a JAX key.
    """
    check_key(key)

    def as_state(count, rows, tree):
        """The arrays of each leaf as one tree for each array, at their leaf's place."""
        leaves, treedef = jax.tree.flatten(tree)
        rows = treedef.flatten_up_to(rows)
        width = len(kind._fields) - 1  # pyright: ignore[reportFunctionMemberAccess]
        columns = list(zip(*rows, strict=True)) if leaves else [()] * width
        return kind(count, *(treedef.unflatten(column) for column in columns))

    def init_all(params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            check_matrix_leaf(path, leaf)
        data = key_data(key)
        start = map_with_place(lambda place, x: init(stream(data, jnp.int32(0), place), x), params)
        return as_state(jnp.zeros((), jnp.int32), start, params)

    def update_all(updates, state, params=None):
        del params
        count, *arrays = state
        count = jnp.asarray(optax.safe_increment(count))
        rows = jax.tree.map(lambda g, *row: update(count, g.astype(jnp.float32), *row), updates, *arrays)
        treedef = jax.tree.structure(updates)
        results = treedef.flatten_up_to(rows)
        steps = treedef.unflatten([step for step, *_ in results])
        return steps, as_state(count, treedef.unflatten([row for _, *row in results]), updates)

    return optax.GradientTransformation(init_all, update_all)
