"""Normalizers: from a gradient to a step whose size it does not decide."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._core.checks import check_function, check_integer
from .._core.xla import always, in_one
from .newton_schulz import Orthogonalizer, newton_schulz
from .numerics import frobenius, norm, safe_reciprocal
from .polar import polar

Normalizer = Callable[[Float[Array, "*b m n"]], Float[Array, "*b m n"]]


def sinkhorn(x: Float[Array, "*b m n"], rounds: int = 5, first: int = -1) -> Float[Array, "*b m n"]:
    """Rows to ℓ2-norm `√n`, then columns to `√m`, `rounds` times.

        X = diag(ρ) G diag(κ),   repeat:   ρ ← √n / |rows of G diag(κ)|,   κ ← √m / |columns of diag(ρ) G|

    Only the vectors `ρ` and `κ` change, in float32: `O(m + n)` scratch, and the matrix is written once.
    The element RMS is 1 afterwards. Rows and columns of zeros stay zero.
    (Scetbon et al., SinkGD, arXiv 2502.06742, Algorithm 3; 5 rounds as there.)

    Args:
      x: the gradient.
      rounds: 5 in the paper.
      first: the axis summed over first; -2 begins with the columns, where those are the outputs.

    Raises:
      TypeError, ValueError: `rounds` below 1, or `first` neither -1 nor -2.
    """
    if first not in (-1, -2):
        raise ValueError(f"first must be -1 or -2, got {first!r}.")
    rounds = check_integer("rounds", rounds, at_least=1)
    second = -3 - first
    g = x.astype(jnp.float32)
    sizes = x.shape[first] ** 0.5, x.shape[second] ** 0.5

    def scales(g):
        # Rows, then columns, by their largest entry: squares are then safe from 1e-30 to 1e30.
        row_unit = safe_reciprocal(jnp.max(jnp.abs(g), axis=first, keepdims=True))
        column_unit = safe_reciprocal(jnp.max(jnp.abs(g * row_unit), axis=second, keepdims=True))

        def one_round(_, scales):
            _, column = scales
            # Each sum has its own factors: one that both shared would be written out at the matrix's size.
            squares = jnp.sum(jnp.square(g * column * row_unit), axis=first, keepdims=True)
            row = row_unit * (sizes[0] * safe_reciprocal(jnp.sqrt(squares)))
            squares = jnp.sum(jnp.square(g * row * column_unit), axis=second, keepdims=True)
            return row, column_unit * (sizes[1] * safe_reciprocal(jnp.sqrt(squares)))

        # A loop: unrolled, XLA would share more between the sums.
        return jax.lax.fori_loop(0, rounds, one_round, (row_unit, jnp.ones_like(column_unit)))

    # A stack holds all layers' gradients, whatever is done to them.
    is_stack = math.prod(x.shape[:-2]) > 1
    row, column = scales(g) if is_stack else in_one(scales, always(g), g)
    return (g * row * column).astype(x.dtype)


def standardize_rows(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Each row minus its mean, over its standard deviation; constant rows go to zero.

    (Ma et al., SWAN, arXiv 2412.13148, GradNorm.)
    """
    g = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(g), axis=-1, keepdims=True)
    g = g * safe_reciprocal(largest)
    centred = g - jnp.mean(g, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True))
    # A constant row leaves the rounding of its mean, which is no signal.
    deviation = jnp.where(deviation > 4 * jnp.finfo(jnp.float32).eps, deviation, 0)
    return (centred * safe_reciprocal(deviation)).astype(x.dtype)


def _unit_rms(x: Float[Array, "*b m n"], axis: int | tuple[int, ...]) -> Float[Array, "*b m n"]:
    """Over `axis` to root mean square one; zeros stay zero."""
    size = math.prod(x.shape[i] for i in np.atleast_1d(axis))
    return (x.astype(jnp.float32) * (safe_reciprocal(norm(x, axis)) * size**0.5)).astype(x.dtype)


def unit_rows(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Every row to ℓ2-norm `√n`: the maximizer of `<x, z>` over `maxᵢ |zᵢ| <= √n`."""
    return _unit_rms(x, -1)


def unit_columns(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Every column to ℓ2-norm `√m`."""
    return _unit_rms(x, -2)


def unit_frobenius(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """The whole matrix to Frobenius norm `√(m n)`: normalized SGD."""
    return _unit_rms(x, (-2, -1))


def whiten(x: Float[Array, "*b m n"], method: Orthogonalizer = polar) -> Float[Array, "*b m n"]:
    """The polar factor at the Frobenius norm of `x`: `O |x|_F / |O|_F`, `O = method(x)`.

    (Ma et al., SWAN, arXiv 2412.13148, GradWhitening.)
    """
    o = method(x)
    return (o.astype(jnp.float32) * (frobenius(x) * safe_reciprocal(frobenius(o)))).astype(x.dtype)


def spectral_lmo(x: Float[Array, "*b m n"], method: Orthogonalizer = newton_schulz) -> Float[Array, "*b m n"]:
    """`√(m/n) msign(x)`, outputs as rows: the maximizer of `<x, z>` over `|z|_2 <= √(m/n)`, the ball of the
    operator norm between RMS norms. (Pethick et al., Scion, arXiv 2502.07529, Table 2.)
    """
    m, n = x.shape[-2:]
    return (m / n) ** 0.5 * method(x)


def sign_lmo(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """`sign(x) / n`, outputs as rows: the ball of the largest entry (Scion, Table 3)."""
    return jnp.sign(x) / x.shape[-1]


def row_lmo(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Every row to ℓ2-norm `1/√n`, outputs as rows: the ball of the largest row (Scion, RowNorm)."""
    return unit_rows(x) / x.shape[-1]


def column_lmo(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Every column to ℓ2-norm `√m`, outputs as rows: the ball of the largest column (Scion, ColNorm)."""
    return unit_columns(x)


def multi_norm(projections: Sequence[Normalizer], rounds: int = 1) -> Normalizer:
    """Normalize with respect to several norms, one projection after the other.

        repeat `rounds` times, for each norm gᵢ in turn:   x ← argmax { <x, z> : gᵢ(z) <= 1 }

    `sinkhorn` is `multi_norm((unit_rows, unit_columns), 5)`, SWAN is `(standardize_rows, whiten)`, and one
    projection alone is SignSGD (`jnp.sign`), normalized SGD (`unit_frobenius`) or Muon without momentum
    (`whiten`, up to its scale).

    Raises:
      TypeError, ValueError: no projections, one that is not a function, or `rounds` below 1.

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
    """With the layer's outputs as rows, as the papers have them; a Flax kernel has them as columns."""
    return lambda g: method(g.mT).mT
