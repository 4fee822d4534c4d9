"""Random directions in the space of the parameters, drawn again whenever they are needed.

A direction is a function of key, step, path and place, so that nobody stores it, and every device draws its
own part. It is drawn one matrix at a time: see `moved`.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._core.checks import check_integer
from .._core.keys import check_key_and_step, key_data, typed
from .._linalg.counter_bits import normal_by_place
from .._linalg.numerics import exact_matmul
from .._matrices.dimension_numbers import leaf_names

# `(key of the leaf, step, number of the matrix in its leaf, (m, n)) -> numbers of mean 0`.
Directions = Callable[[PRNGKeyArray, Int[Array, ""], Any, tuple[int, int]], Float[Array, "m n"]]

_SUBSPACE, _COORDINATES = 1, 2  # keep the draws of `low_rank_directions` apart


def gaussian(
    key: PRNGKeyArray, step: Int[Array, ""], matrix: Any, shape: tuple[int, int]
) -> Float[Array, "m n"]:
    """Standard normal numbers everywhere (MeZO)."""
    return normal_by_place(jax.random.fold_in(key, step), matrix, (1, *shape))[0]


def low_rank_directions(rank: int, period: int) -> Directions:
    """Directions in a random subspace of each matrix, which stays for a period (SubZero).

        Z = c U N Vᵀ,   c = √(m n) / r        U (m, r), V (n, r) orthonormal, N (r, r) standard normal

    Within a period the slope is known along `r²` of the `m n` directions of a matrix. Over fresh subspaces
    the estimate has the gradient as its mean and no smaller variance than `gaussian` directions: its squared
    norm is `m n (1 + 2/r²)` times the gradient's, beside `m n + 2`. The matrices are those of the last two
    axes of a leaf; one whose smaller side is at most `rank`, and a vector, get `gaussian` directions.

    Args:
      rank: `r`; 8 in the authors' code, 24 in its example.
      period: steps between subspaces; 2000 in the authors' code, 1000 in its example.

    Raises:
      TypeError, ValueError: an argument is not an integer of at least 1.

    References:
      Yu et al., SubZero, arXiv 2410.08989, and zimingyy/SubZero at cf6effdd.
    """
    rank = check_integer("rank", rank, at_least=1)
    period = check_integer("period", period, at_least=1)

    def draw(
        key: PRNGKeyArray, step: Int[Array, ""], matrix: Any, shape: tuple[int, int]
    ) -> Float[Array, "m n"]:
        if min(shape) <= rank:
            return gaussian(key, step, matrix, shape)
        subspace, coordinates = (jax.random.fold_in(key, number) for number in (_SUBSPACE, _COORDINATES))
        of_period = jax.random.fold_in(jax.random.fold_in(subspace, step // period), matrix)
        u, v = (
            jnp.linalg.qr(jax.random.normal(own, (side, rank)))[0]
            for own, side in zip(jax.random.split(of_period), shape, strict=True)
        )
        of_step = jax.random.fold_in(jax.random.fold_in(coordinates, step), matrix)
        n = jax.random.normal(of_step, (rank, rank)) * (math.sqrt(math.prod(shape)) / rank)
        return exact_matmul(exact_matmul(u, n), v.T)

    return draw


def leaf_keys(params: Any, key: Any, step: Any) -> tuple[list[PRNGKeyArray], Int[Array, ""]]:
    """The key of each leaf, by its path, so that it depends on no other leaf; and the step as an integer."""
    step = check_key_and_step(key, step)
    own = typed(key_data(key))
    return [jax.random.fold_in(own, zlib.crc32("/".join(x).encode())) for x in leaf_names(params)], step


def _as_matrices(x: Array) -> Float[Array, "matrices m n"]:
    """A leaf as a stack of the matrices in its last two axes; a vector is a matrix of one row."""
    *_, m, n = (1, 1, *x.shape)
    return x.reshape(-1, m, n) if x.size else x.reshape(0, max(m, 1), max(n, 1))


def moved(x: Array, size: Any, key: PRNGKeyArray, step: Int[Array, ""], directions: Directions) -> Array:
    """`x + size · Z` of one leaf, in place if `x` is donated: one matrix of the leaf at a time."""
    stack = _as_matrices(x)
    _, *shape = stack.shape

    def next_one(i, stack):
        w = jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
        new = w.astype(jnp.float32) + size * directions(key, step, i, (shape[0], shape[1]))
        return jax.lax.dynamic_update_index_in_dim(stack, new.astype(stack.dtype), i, 0)

    if len(stack) == 1:
        return next_one(0, stack).reshape(x.shape)
    return jax.lax.fori_loop(0, len(stack), next_one, stack).reshape(x.shape)


def drawn(params: Any, key: Any, step: Any, directions: Directions) -> Any:
    """The whole direction, float32."""
    keys, step = leaf_keys(params, key, step)
    leaves, treedef = jax.tree.flatten(params)
    zeros = [jnp.zeros(jnp.shape(x), jnp.float32) for x in leaves]
    return treedef.unflatten(
        [moved(x, 1.0, own, step, directions) for x, own in zip(zeros, keys, strict=True)]
    )
