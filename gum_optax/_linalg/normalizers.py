"""Normalizers: turn a gradient into a step of fixed size."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._core.batches import map_together, reduce_together
from .._core.checks import check_function, check_integer
from .._core.xla import in_one, repeat
from .newton_schulz import Orthogonalizer, newton_schulz
from .numerics import frobenius, norm, safe_reciprocal
from .polar import polar

Normalizer = Callable[[Float[Array, "*b m n"]], Float[Array, "*b m n"]]


def sinkhorn(x: Float[Array, "*b m n"], rounds: int = 5, first: int = -1) -> Float[Array, "*b m n"]:
    """Scale rows to ℓ2-norm `√n`, then columns to `√m`, `rounds` times.

        X = diag(ρ) G diag(κ),   repeat:   ρ ← √n / |rows of G diag(κ)|,   κ ← √m / |columns of diag(ρ) G|

    Only the vectors `ρ` and `κ` change, in float32: the scratch is `O(m + n)`, and the matrix is written
    once. The element RMS of the result is 1. Rows and columns of zeros stay zero.
    (Scetbon et al., SinkGD, arXiv 2502.06742, Algorithm 3, with 5 rounds.)

    Args:
      x: the gradient.
      rounds: 5 in the paper.
      first: the axis of the first sum; -2 begins with the columns, for matrices whose columns are outputs.

    Raises:
      TypeError, ValueError: `rounds` below 1, or `first` neither -1 nor -2.

    Examples:
      >>> y = gum_optax.sinkhorn(jax.random.normal(jax.random.key(0), (4, 8)))
      >>> print(np.linalg.norm(y, axis=0).round(3))  # √4
      [2. 2. 2. 2. 2. 2. 2. 2.]
    """
    (result,) = sinkhorn_together([x], rounds, first)
    return result


def sinkhorn_together(
    xs: Sequence[Float[Array, "*b m n"]], rounds: int = 5, first: int = -1
) -> list[Float[Array, "*b m n"]]:
    """`sinkhorn` of each array; all arrays take each half of a round at once, in few kernels of a GPU."""
    if first not in (-1, -2):
        raise ValueError(f"first must be -1 or -2, got {first!r}.")
    rounds = check_integer("rounds", rounds, at_least=1)
    second = -3 - first

    def scales(*gs):
        def units_along(axis, xs):
            """What gives each row, or column, a largest entry of 1."""
            return map_together(safe_reciprocal, reduce_together(jax.lax.max, [jnp.abs(x) for x in xs], axis))

        def scales_along(axis, others, units):
            """What gives each row, or column, of `G` times `others` norm 1."""
            # Give each sum its own factors: XLA would write a shared product out at the size of the matrix.
            rows = zip(gs, others, units, strict=True)
            squares = reduce_together(jax.lax.add, [jnp.square(g * x * unit) for g, x, unit in rows], axis)
            return map_together(lambda x, unit: unit * safe_reciprocal(jnp.sqrt(x)), squares, units)

        # Divide rows, then columns, by their largest entry: squares then stay finite from 1e-30 to 1e30.
        row_units = units_along(first, gs)
        column_units = units_along(second, [g * unit for g, unit in zip(gs, row_units, strict=True)])

        def one_round(scales, _):
            _, columns = scales
            rows = scales_along(first, columns, row_units)
            return rows, scales_along(second, rows, column_units)

        # Use a loop on a CPU: XLA would share more products between the sums of unrolled rounds.
        start = row_units, [jnp.ones_like(unit) for unit in column_units]
        return repeat(one_round, start, np.arange(rounds))

    gs = [x.astype(jnp.float32) for x in xs]
    # A stack holds the gradients of all layers in any case; `in_one` is for single matrices.
    is_stack = any(math.prod(g.shape[:-2]) > 1 for g in gs)
    rows, columns = scales(*gs) if is_stack else in_one(scales, *gs)
    # Norms of 1 in each half of a round give the same directions; the last half's norm is put right here.
    found = zip(xs, gs, rows, columns, strict=True)
    return [(g * row * (x.shape[second] ** 0.5 * column)).astype(x.dtype) for x, g, row, column in found]


def standardize_rows(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Subtract each row's mean and divide by its standard deviation; constant rows become zero.

    (Ma et al., SWAN, arXiv 2412.13148, GradNorm.)

    Examples:
      >>> y = gum_optax.standardize_rows(jnp.array([[1.0, 3.0], [7.0, 5.0], [4.0, 4.0]]))
      >>> y.round(3).tolist()
      [[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]]
    """
    g = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(g), axis=-1, keepdims=True)
    g = g * safe_reciprocal(largest)
    centred = g - jnp.mean(g, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True))
    # What remains of a constant row is the rounding of its mean: noise, not signal.
    deviation = jnp.where(deviation > 4 * jnp.finfo(jnp.float32).eps, deviation, 0)
    return (centred * safe_reciprocal(deviation)).astype(x.dtype)


def _unit_rms(x: Float[Array, "*b m n"], axis: int | tuple[int, ...]) -> Float[Array, "*b m n"]:
    """Scale `x` to root mean square one over `axis`; zeros stay zero."""
    size = math.prod(x.shape[i] for i in np.atleast_1d(axis))
    return (x.astype(jnp.float32) * (safe_reciprocal(norm(x, axis)) * size**0.5)).astype(x.dtype)


def unit_rows(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Scale every row to ℓ2-norm `√n`: the maximizer of `<x, z>` over `maxᵢ |zᵢ| <= √n`.

    Examples:
      >>> x = jnp.array([[4.0, 4.0, 4.0, 4.0], [0.0, -1.0, 0.0, 0.0]])
      >>> gum_optax.unit_rows(x).round(3).tolist()
      [[1.0, 1.0, 1.0, 1.0], [0.0, -2.0, 0.0, 0.0]]
    """
    return _unit_rms(x, -1)


def unit_columns(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Scale every column to ℓ2-norm `√m`.

    Examples:
      >>> x = jnp.array([[4.0, 0.0], [4.0, -1.0], [4.0, 0.0], [4.0, 0.0]])
      >>> gum_optax.unit_columns(x).round(3).tolist()
      [[1.0, 0.0], [1.0, -2.0], [1.0, 0.0], [1.0, 0.0]]
    """
    return _unit_rms(x, -2)


def unit_frobenius(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Scale the whole matrix to Frobenius norm `√(m n)`: normalized SGD.

    Examples:
      >>> y = gum_optax.unit_frobenius(jnp.full((4, 8), -3.0))
      >>> round(float(y[0, 0]), 3)
      -1.0
    """
    return _unit_rms(x, (-2, -1))


def whiten(x: Float[Array, "*b m n"], method: Orthogonalizer = polar) -> Float[Array, "*b m n"]:
    """The polar factor, scaled to the Frobenius norm of `x`: `O |x|_F / |O|_F`, `O = method(x)`.

    (Ma et al., SWAN, arXiv 2412.13148, GradWhitening.)

    Examples:
      >>> y = gum_optax.whiten(jnp.diag(jnp.array([7.0, 1.0])))
      >>> print(np.linalg.svd(y, compute_uv=False).round(3))  # 7² + 1² = 5² + 5²
      [5. 5.]
    """
    o = method(x)
    return (o.astype(jnp.float32) * (frobenius(x) * safe_reciprocal(frobenius(o)))).astype(x.dtype)


def spectral_lmo(x: Float[Array, "*b m n"], method: Orthogonalizer = newton_schulz) -> Float[Array, "*b m n"]:
    """`√(m/n) msign(x)` for outputs as rows: the maximizer of `<x, z>` over `|z|_2 <= √(m/n)`.

    That set is the unit ball of the operator norm between RMS norms. (Pethick et al., Scion, arXiv
    2502.07529, Table 2.)

    Examples:
      >>> y = gum_optax.spectral_lmo(jax.random.normal(jax.random.key(0), (4, 16)), gum_optax.polar)
      >>> print(np.linalg.svd(y, compute_uv=False).round(3))  # √(4 / 16)
      [0.5 0.5 0.5 0.5]
    """
    m, n = x.shape[-2:]
    return (m / n) ** 0.5 * method(x)


def sign_lmo(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """`sign(x) / n`, outputs as rows: the maximizer over the ball of the largest entry (Scion, Table 3).

    Examples:
      >>> gum_optax.sign_lmo(jnp.array([[3.0, -4.0], [0.0, 0.5]])).tolist()
      [[0.5, -0.5], [0.0, 0.5]]
    """
    return jnp.sign(x) / x.shape[-1]


def row_lmo(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Scale every row, an output, to ℓ2-norm `1/√n`: the ball of the largest row (Scion, RowNorm).

    Examples:
      >>> x = jnp.array([[4.0, 4.0, 4.0, 4.0], [0.0, -1.0, 0.0, 0.0]])
      >>> gum_optax.row_lmo(x).round(3).tolist()
      [[0.25, 0.25, 0.25, 0.25], [0.0, -0.5, 0.0, 0.0]]
    """
    return unit_rows(x) / x.shape[-1]


def column_lmo(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Scale every column, an input, to ℓ2-norm `√m`: the ball of the largest column (Scion, ColNorm).

    Examples:
      >>> x = jnp.array([[4.0, 0.0], [4.0, -1.0], [4.0, 0.0], [4.0, 0.0]])
      >>> gum_optax.column_lmo(x).round(3).tolist()
      [[1.0, 0.0], [1.0, -2.0], [1.0, 0.0], [1.0, 0.0]]
    """
    return unit_columns(x)


def multi_norm(projections: Sequence[Normalizer], rounds: int = 1) -> Normalizer:
    """Normalize with respect to several norms: apply one projection after the other.

        repeat `rounds` times, for each norm gᵢ in turn:   x ← argmax { <x, z> : gᵢ(z) <= 1 }

    `sinkhorn` is `multi_norm((unit_rows, unit_columns), 5)`, and SWAN is `(standardize_rows, whiten)`. A
    single projection is SignSGD (`jnp.sign`), normalized SGD (`unit_frobenius`) or Muon without momentum
    (`whiten`, up to its scale).

    Raises:
      TypeError, ValueError: `projections` is empty or holds something other than a function, or `rounds` is
        below 1.

    Examples:
      >>> x = jax.random.normal(jax.random.key(0), (4, 8))
      >>> method = gum_optax.multi_norm((gum_optax.unit_rows, gum_optax.unit_columns), rounds=5)
      >>> bool(jnp.allclose(method(x), gum_optax.sinkhorn(x), atol=1e-5))
      True

    References:
      Scetbon et al., Gradient Multi-Normalization, arXiv 2502.06742, Algorithm 1.
    """
    projections = tuple(projections)
    if not projections:
        raise ValueError("projections must hold at least one function such as gum_optax.unit_rows, got none.")
    for projection in projections:
        check_function("projections", projection, "gum_optax.unit_rows")
    rounds = check_integer("rounds", rounds, at_least=1)

    def normalized(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
        for _ in range(rounds):
            for projection in projections:
                x = projection(x)
        return x

    return normalized


def outputs_first(method: Normalizer) -> Normalizer:
    """Apply `method` to the transpose: the papers have outputs as rows, a Flax kernel has them as columns."""
    return lambda g: method(g.mT).mT
