"""The shapes of the weights, for rules that `low_rank` initializes on coordinates.

`low_rank(inner)` calls `inner.init` with coordinates `(*blocks, r, n)`. A rule whose initial state depends on
the fans of the weight asks here for the weight's `(m, n)`, which the coordinates do not have.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]
_full: contextvars.ContextVar[list[Shape] | None] = contextvars.ContextVar("full", default=None)


@contextlib.contextmanager
def coordinates_of(weights: Any) -> Iterator[None]:
    """Within this context, leaves are coordinates of these weights."""
    token = _full.set([jnp.shape(x) for x in jax.tree.leaves(weights)])
    try:
        yield
    finally:
        _full.reset(token)


def full_shapes(tree: Any) -> list[Shape]:
    """The shape of the weight behind each leaf: its own, unless leaves are coordinates."""
    leaves, full = jax.tree.leaves(tree), _full.get()
    # optax also calls `init` with a placeholder for the whole tree, which has no leaves.
    return [jnp.shape(x) for x in leaves] if full is None or not leaves else full
