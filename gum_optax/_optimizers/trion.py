"""Trion: Muon in the strongest cosines of the momentum, with error feedback."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from .._core.checks import check_function, check_integer, check_number
from .._linalg.newton_schulz import Orthogonalizer, newton_schulz
from .._linalg.orthonormal import lift, project
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._mesh.explicit import zeros
from .._transforms.per_matrix import per_matrix
from .._transforms.scaling import shape_factor
from .matrix_optimizer import WeightDecay, matrix_optimizer


def dct_columns(m: Float[Array, "*b m n"], rank: int) -> Float[Array, "*b m r"]:
    """The `r` columns `d` of the orthonormal DCT with the largest ℓ1 norms of `dᵀM`.

    The basis is fixed for each size, so `r` integers identify the subspace. The function needs only a fast
    transform, no factorization. (Modoranu et al., arXiv 2505.17967.)

    Args:
      m: the matrix.
      rank: `r`, from 1 to the size of its first side.

    Raises:
      TypeError, ValueError: `rank` is out of range or not an integer.

    Examples:
      >>> d = gum_optax.dct_columns(jnp.ones((4, 8)), rank=1)
      >>> print(np.asarray(d).ravel().round(3))  # the constant column
      [0.5 0.5 0.5 0.5]
    """
    size = m.shape[-2]
    rank = check_integer("rank", rank, at_least=1)
    if rank > size:
        raise ValueError(f"rank must be at most {size}, the size of the matrix, got {rank}.")
    similarity = jnp.sum(jnp.abs(jax.scipy.fft.dct(m, axis=-2, norm="ortho")), axis=-1)
    _, chosen = jax.lax.top_k(similarity, rank)
    # The DCT-II: row i of column j is √(2/m) cos(π j (2i + 1) / 2m), and √(1/m) for j = 0. Reduce the angle
    # as an integer: float32 would lose the phase of a large j (2i + 1).
    chosen = chosen[..., None, :]
    odd = (2 * jnp.arange(size) + 1).reshape(*[1] * (chosen.ndim - 2), size, 1)
    quarters = (chosen * odd) % (4 * size)
    waves = jnp.cos(jnp.pi / (2 * size) * quarters.astype(jnp.float32))
    return waves * jnp.where(chosen == 0, 1.0, 2**0.5).astype(m.dtype) / size**0.5


class TrionState(NamedTuple):
    """State of `scale_by_trion`.

    Examples:
      >>> state = gum_optax.scale_by_trion(rank=2).init({"kernel": jnp.ones((4, 8))})
      >>> state.momentum["kernel"].shape  # of full size, whatever the rank
      (4, 8)
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    momentum: optax.Updates  # M, each leaf (*, m, n) float32


def scale_by_trion(
    rank: int, momentum: Any = 0.95, orthogonalizer: Orthogonalizer = newton_schulz
) -> optax.GradientTransformation:
    """Orthogonalize the momentum in its strongest cosines, and keep the rest for later steps.

        M ← M + G,   P = the r columns of the DCT with the largest |PᵀM|₁,   R = PᵀM
        M ← M - (1 - μ) P R,   step = P NS(R)

    Args:
      rank: `r`, the number of cosines, at most `m`.
      momentum: `μ`, the fraction of the momentum that stays in the directions of the step; 0.95 in the paper.
      orthogonalizer: a function `(*, r, n) -> (*, r, n)`.

    Returns:
      A transformation over trees of `(*, m, n)` leaves. State: a full-size momentum, `m n` numbers per
      matrix.

    Raises:
      TypeError, ValueError: an argument or a leaf is out of range or of the wrong type.

    Examples:
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
      >>> rule = gum_optax.scale_by_trion(rank=2, orthogonalizer=gum_optax.polar)
      >>> steps, state = rule.update(gradients, rule.init(gradients))
      >>> print(np.linalg.svd(steps["kernel"], compute_uv=False).round(3))
      [1. 1. 0. 0.]

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


def trion(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    momentum: float = 0.95,
    orthogonalizer: Orthogonalizer | None = None,
    consistent_rms: float | None = 0.2,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trion: Muon in the strongest cosines of the momentum, with error feedback.

        M ← M + G,   P = the r columns of the DCT with the largest |PᵀM|₁,   R = PᵀM
        M ← M - (1 - μ) P R,   step = P NS(R)

    State: a full-size momentum, `m n` numbers per matrix, as in Muon. Only the orthogonalization is small.

    Args:
      learning_rate: a number or a schedule.
      rank: `r`, the number of cosines, at most `m`.
      momentum: `μ`, the fraction of the momentum that stays in the directions of the step; 0.95 in the paper.
      orthogonalizer: `NS`, a function `(*, r, n) -> (*, r, n)`: `newton_schulz` (the default), `polar`, or
        any other.
      consistent_rms, weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `muon`; also if `rank` is below 1 or not an integer.

    Examples:
      >>> params = {"kernel": jnp.ones((4, 8))}
      >>> gum_optax.memory_report(gum_optax.trion(1e-3, rank=2), params).state  # bytes
      {'momentum': 128, 'bookkeeping': 12}

    References:
      Modoranu et al., arXiv 2505.17967, Algorithm 2.
    """
    rule = scale_by_trion(rank, momentum, newton_schulz if orthogonalizer is None else orthogonalizer)
    return matrix_optimizer(
        rule,
        learning_rate,
        shape_factor(consistent_rms),
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        others=others,
    )
