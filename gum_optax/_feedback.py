"""Low-rank steps of a full-size momentum that keeps what they leave out: error feedback."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ._checks import check_function, check_integer, check_number
from ._norms import frobenius, inverse, norm
from ._orthogonalize import Orthogonalizer, newton_schulz
from ._per_matrix import per_matrix
from ._products import exact_matmul
from ._sharding import placed, zeros
from ._subspace import lift, orthonormal_or, orthonormalize, project, regularized

_EPS = float(jnp.finfo(jnp.float32).eps)
# What a completing column of Dion's P sees of M, in units of eps |M|: the floor, over a column of Y of norm
# 1/√r, so √r of them.
_ROUNDINGS = 64.0


def dct_columns(m: Float[Array, "*b m n"], rank: int) -> Float[Array, "*b m r"]:
    """The `r` columns of the orthonormal DCT that see most of the matrix: largest ℓ1 norm of `dᵀM`.

    One fixed basis a size, so that `r` integers say which; no factorization, only a fast transform.
    (Modoranu et al., arXiv 2505.17967.)

    Args:
      m: the matrix.
      rank: `r`, from 1 to the size of its first side.

    Raises:
      TypeError, ValueError: `rank` is not such an integer.
    """
    size = m.shape[-2]
    rank = check_integer("rank", rank, at_least=1)
    if rank > size:
        raise ValueError(f"rank must be at most {size}, the size of the matrix, got {rank}.")
    similarity = jnp.sum(jnp.abs(jax.scipy.fft.dct(m, axis=-2, norm="ortho")), axis=-1)
    _, chosen = jax.lax.top_k(similarity, rank)
    # The DCT-II: row i of column j is √(2/m) cos(π j (2i + 1) / 2m), and √(1/m) for j = 0. The angle is
    # reduced as an integer: float32 would lose the phase of a large j (2i + 1).
    chosen = chosen[..., None, :]
    odd = (2 * jnp.arange(size) + 1).reshape(*[1] * (chosen.ndim - 2), size, 1)
    quarters = (chosen * odd) % (4 * size)
    waves = jnp.cos(jnp.pi / (2 * size) * quarters.astype(jnp.float32))
    return waves * jnp.where(chosen == 0, 1.0, 2**0.5).astype(m.dtype) / size**0.5


class TrionState(NamedTuple):
    """State of `trion_rule`."""

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    momentum: Any  # M, a leaf (*, m, n) float32


def trion_rule(
    rank: int, momentum: Any = 0.95, orthogonalizer: Orthogonalizer = newton_schulz
) -> optax.GradientTransformation:
    """Orthogonalize the momentum in its strongest cosines, and keep the rest for later.

        M ← M + G,   P = the r columns of the DCT with the largest |PᵀM|₁,   R = PᵀM
        M ← M - (1 - μ) P R,   step = P NS(R)

    Args:
      rank: `r`, cosines kept; at most `m` are.
      momentum: `μ`, what stays of the directions stepped in; 0.95 in the paper.
      orthogonalizer: a function `(*, r, n) -> (*, r, n)`.

    Returns:
      A transformation over trees of `(*, m, n)` leaves. State: a full-size momentum, `m n` numbers a matrix.

    Raises:
      TypeError, ValueError: an argument or a leaf is out of range or of the wrong type.

    References:
      Modoranu et al., arXiv 2505.17967, Algorithm 2 (Trion).
    """
    rank = check_integer("rank", rank, at_least=1)
    momentum = check_number("momentum", momentum, at_least=0, below=1)
    check_function("orthogonalizer", orthogonalizer, "gum_optax.polar")

    def init(key, x):
        del key
        return (zeros(x, -2, -1),)

    def update(count, g, m):
        del count
        m = m + g
        p = dct_columns(m, min(rank, m.shape[-2]))
        r = project(p, m)
        return lift(p, orthogonalizer(r)), m - (1 - momentum) * lift(p, r)

    return per_matrix(TrionState, init, update)


class DionState(NamedTuple):
    """State of `dion_rule`."""

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    momentum: Any  # M, a leaf (*, m, n) float32
    right: Any  # Q, a leaf (*, n, r) float32 with unit columns


def dion_rule(rank: int, momentum: Any = 0.95, key: int | jax.Array = 0) -> optax.GradientTransformation:
    """Orthonormalize the momentum by one power iteration, and keep the rest for later.

        M ← M + G,   P = orth(M Q),   R = MᵀP,   M ← M - (1 - μ) P Rᵀ
        Q ← R, its columns to norm one,   step = P Qᵀ

    `Q` starts random, as in the paper. Where `M` has fewer than `r` directions the columns of `R` that are
    only its rounding get no step, and leave their columns of `Q` as they were.

    Args:
      rank: `r`; at most `m`.
      momentum: `μ`, what stays of the directions stepped in; 0.95 in the paper.
      key: an integer seed or a JAX key, of the first `Q`.

    Returns:
      A transformation over trees of `(*, m, n)` leaves. State: a full-size momentum and `Q`, `m n + n r`
      numbers a matrix.

    Raises:
      TypeError, ValueError: an argument or a leaf is out of range or of the wrong type.

    References:
      Ahn et al., Dion, arXiv 2504.05295, Algorithm 1.
    """
    rank = check_integer("rank", rank, at_least=1)
    momentum = check_number("momentum", momentum, at_least=0, below=1)

    def init(key, x):
        *blocks, rows, columns = x.shape
        q = jax.random.normal(key, (*blocks, columns, min(rank, rows)), jnp.float32)
        return zeros(x, -2, -1), placed(q * inverse(norm(q, -2)), x, -1, q.shape[-1])

    def update(count, g, m, q):
        del count
        m = m + g
        p = _completed(exact_matmul(m, q))
        r = exact_matmul(m.mT, p)
        lengths = norm(r, -2)
        unit, seen = r * inverse(lengths), lengths > _ROUNDINGS * _EPS * frobenius(m)
        m = m - (1 - momentum) * lift(p, r.mT)
        return lift(p, jnp.where(seen, unit, 0).mT), m, jnp.where(seen, unit, q)

    return per_matrix(DionState, init, update, key)


def _completed(y: Array) -> Array:
    """`orth(Y)`, completed by columns of an identity where `Y` has not the rank.

    They come in at float32's last bit, so that they do not tilt what `Y` has, and so in three shifted passes.
    Where rounding defeats those, the identity's columns take the place of all: nothing is lost, for what a
    step does not take stays in the momentum.
    """
    start = jnp.broadcast_to(jnp.eye(*y.shape[-2:], dtype=y.dtype), y.shape)
    q = orthonormalize(regularized(y * inverse(frobenius(y)), start, _EPS), shifted_passes=3)
    return orthonormal_or(q, start)
