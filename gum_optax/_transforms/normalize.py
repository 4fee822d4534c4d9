"""Normalize each matrix of a tree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.checks import check_function
from .._core.xla import map_sequentially
from .._linalg.normalizers import Normalizer


def normalize(method: Normalizer) -> optax.GradientTransformation:
    """Replace each matrix by its normalized form, in float32: `step = method(g)`. No state.

    Not in bfloat16: rows without their mean have a null space, which whitening would fill with rounding.

    Args:
      method: `sinkhorn`, `standardize_rows`, a `multi_norm`, or any function `(*, m, n) -> (*, m, n)`.

    Raises:
      TypeError: `method` is not a function.
    """
    check_function("method", method, "gum_optax.sinkhorn")
    return _of_each(jax.tree.map, method)


def normalize_sequentially(method: Normalizer) -> optax.GradientTransformation:
    """`normalize`, one leaf after the other: for a method that makes matrices on the way, to hold one leaf's.

    `sinkhorn` makes none, and would only have the leaf that waits copied.
    """
    return _of_each(map_sequentially, method)


def _of_each(mapped: Callable[..., Any], method: Normalizer) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: mapped(lambda g: method(g.astype(jnp.float32)), updates))
