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

from .._core.checks import check_function, check_integer
from .._core.context import NO_CONTEXT
from .._core.keys import check_key_and_step, key_data, typed
from .._linalg.counter_bits import normal_by_place
from .._linalg.numerics import exact_matmul, wide_dtype
from .._matrices.dimension_numbers import leaf_names
from .._mesh.explicit import on_auto_axes

# `(key of the leaf, (step, query), number of the matrix in its leaf, (m, n)) -> numbers of mean 0`.
When = tuple[Int[Array, ""], Any]
Directions = Callable[[PRNGKeyArray, When, Any, tuple[int, int]], Float[Array, "m n"]]

_SUBSPACE, _COORDINATES = 1, 2  # keep the draws of `low_rank_directions` apart


def _folded(key: PRNGKeyArray, when: When) -> PRNGKeyArray:
    step, query = when
    return jax.random.fold_in(jax.random.fold_in(key, step), query)


def gaussian(key: PRNGKeyArray, when: When, matrix: Any, shape: tuple[int, int]) -> Float[Array, "m n"]:
    """Standard normal numbers everywhere (MeZO).

    Examples:
      >>> draw = lambda step: gum_optax.gaussian(jax.random.key(0), (jnp.int32(step), 0), 0, (4, 8))
      >>> draw(0).shape, bool((draw(0) == draw(0)).all()), bool((draw(0) == draw(1)).any())
      ((4, 8), True, False)
    """
    return normal_by_place(_folded(key, when), matrix, (1, *shape))[0]


def low_rank_directions(rank: int, period: int) -> Directions:
    """Directions in a random subspace of each matrix, which stays for a period (SubZero).

        Z = c U N Vᵀ,   c = √(m n) / r        U (m, r), V (n, r) orthonormal, N (r, r) standard normal

    Within a period the slope is known along `r²` of the `m n` directions of a matrix. Over fresh subspaces
    the estimate has the gradient as its mean and no smaller variance than `gaussian` directions: its squared
    norm is `m n (1 + 2/r²)` times the gradient's, beside `m n + 2`. The matrices are those of the last two
    axes of a leaf; one whose smaller side is at most `rank`, and a vector, get `gaussian` directions.

    Args:
      rank: `r`; 8 in the authors' code, 24 in its example.
      period: steps between subspaces, whatever the number of queries; 2000 in the authors' code, 1000 in its
        example.

    Raises:
      TypeError, ValueError: an argument is not an integer of at least 1.

    Examples:
      >>> directions = gum_optax.low_rank_directions(rank=2, period=1000)
      >>> z = gum_optax.walk(jnp.zeros((4, 8)), key=0, size=1.0, directions=directions)
      >>> int(np.linalg.matrix_rank(z, tol=1e-3))
      2

    References:
      Yu et al., SubZero, arXiv 2410.08989, and zimingyy/SubZero at cf6effdd.
    """
    rank = check_integer("rank", rank, at_least=1)
    period = check_integer("period", period, at_least=1)

    def draw(key: PRNGKeyArray, when: When, matrix: Any, shape: tuple[int, int]) -> Float[Array, "m n"]:
        step, _ = when
        if min(shape) <= rank:
            return gaussian(key, when, matrix, shape)
        subspace, coordinates = (jax.random.fold_in(key, number) for number in (_SUBSPACE, _COORDINATES))
        of_period = jax.random.fold_in(jax.random.fold_in(subspace, step // period), matrix)
        u, v = (
            jnp.linalg.qr(jax.random.normal(own, (side, rank)))[0]
            for own, side in zip(jax.random.split(of_period), shape, strict=True)
        )
        of_step = jax.random.fold_in(_folded(coordinates, when), matrix)
        n = jax.random.normal(of_step, (rank, rank)) * (math.sqrt(math.prod(shape)) / rank)
        return exact_matmul(exact_matmul(u, n), v.T)

    return draw


def leaf_keys(params: Any, key: Any, step: Any) -> tuple[list[PRNGKeyArray], Int[Array, ""]]:
    """The key of each leaf, by its path, so that it depends on no other leaf; and the step as an integer.

    Raises:
      TypeError: a leaf has no real floating-point numbers.
    """
    step = check_key_and_step(key, step)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(
                f"leaf {jax.tree_util.keystr(path)} is {jnp.result_type(x)}, and only real floating-point"
                " numbers can be moved: pass the parameters that are trained, such as nnx.state(model,"
                " nnx.Param), and close over the rest."
            )
    own = typed(key_data(key))
    return [jax.random.fold_in(own, zlib.crc32("/".join(x).encode())) for x in leaf_names(params)], step


def check_directions(directions: Any) -> Directions:
    """Check for a function of four arguments, which `low_rank_directions` itself is not."""
    if directions is low_rank_directions:
        raise TypeError("directions must be low_rank_directions(rank, period), with its arguments.")
    return check_function("directions", directions, "gum_optax.gaussian")


def moved(x: Array, size: Any, key: PRNGKeyArray, when: When, directions: Directions) -> Array:
    """`x + size · Z` of one leaf, in place if `x` is donated: one matrix of the leaf at a time.

    A vector is a matrix of one row. On a mesh of any kind of axes.
    """
    if not x.size:
        return x
    *_, m, n = (1, 1, *x.shape)

    def inside(x, state, params, context, extra_args):
        del params, context
        size, key, when = extra_args
        stack = x.reshape(-1, m, n)

        def next_one(i, stack):
            w = jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
            new = w.astype(wide_dtype(x)) + size * directions(key, when, i, (m, n))
            return jax.lax.dynamic_update_index_in_dim(stack, new.astype(stack.dtype), i, 0)

        stack = next_one(0, stack) if len(stack) == 1 else jax.lax.fori_loop(0, len(stack), next_one, stack)
        return stack.reshape(x.shape), state

    return on_auto_axes(inside)(x, (), None, NO_CONTEXT, (jnp.asarray(size), key, when))[0]


def drawn(params: Any, key: Any, step: Any, query: Any, directions: Directions) -> Any:
    """The whole direction, at least float32."""
    keys, step = leaf_keys(params, key, step)
    leaves, treedef = jax.tree.flatten(params)
    zeros = [jnp.zeros_like(x, wide_dtype(x)) for x in leaves]
    rows = zip(zeros, keys, strict=True)
    return treedef.unflatten([moved(x, 1.0, own, (step, query), directions) for x, own in rows])


def scalar(value: Any) -> Float[Array, ""]:
    """The value of a loss, at least float32.

    Raises:
      TypeError, ValueError: it is no number.
    """
    if isinstance(value, tuple | list | dict):
        raise TypeError(f"loss must return a number alone, got a {type(value).__name__}.")
    if jnp.shape(value):
        raise ValueError(f"loss must return a number, got shape {jnp.shape(value)}.")
    return jnp.asarray(value, wide_dtype(value))
