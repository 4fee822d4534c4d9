"""Dion: one power iteration of the momentum per step, with error feedback."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .._core.checks import check_integer, check_number
from .._linalg.numerics import exact_matmul, frobenius, norm, safe_reciprocal, to_unit_norm
from .._linalg.orthonormal import lift, orthonormal_or, orthonormalize, regularized
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._mesh.explicit import placed, zeros
from .._transforms.per_matrix import per_matrix
from .._transforms.scaling import fan_ratio
from .matrix_optimizer import WeightDecay, matrix_optimizer

_EPS = float(jnp.finfo(jnp.float32).eps)
# The largest length of `Mᵀp`, in units of eps |M|, for a column p that only completes P. The floor of eps is
# relative to a column of Y of norm 1/√r, so the length is about √r of these units.
_ROUNDINGS = 64.0


class DionState(NamedTuple):
    """State of `scale_by_dion`.

    Examples:
      >>> state = gum_optax.scale_by_dion(rank=2).init({"kernel": jnp.ones((4, 8))})
      >>> state.momentum["kernel"].shape, state.right["kernel"].shape
      ((4, 8), (8, 2))
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    momentum: optax.Updates  # M, each leaf (*, m, n) float32
    right: optax.Updates  # Q, each leaf (*, n, r) float32 with unit columns


def scale_by_dion(rank: int, momentum: Any = 0.95, key: int | jax.Array = 0) -> optax.GradientTransformation:
    """Orthonormalize the momentum by one power iteration, and keep the rest for later steps.

        M ← M + G,   P = orth(M Q),   R = MᵀP,   M ← M - (1 - μ) P Rᵀ
        Q ← R, its columns to norm one,   step = P Qᵀ

    `Q` starts random, as in the paper. If `M` has fewer than `r` directions, some columns of `R` are only
    rounding. Such a column makes no step, and leaves its column of `Q` unchanged.

    Args:
      rank: `r`, at most `m`.
      momentum: `μ`, the fraction of the momentum that stays in the directions of the step; 0.95 in the paper.
      key: an integer seed or a JAX key, for the first `Q`.

    Returns:
      A transformation over trees of `(*, m, n)` leaves. State: a full-size momentum and `Q`, `m n + n r`
      numbers per matrix.

    Raises:
      TypeError, ValueError: an argument or a leaf is out of range or of the wrong type.

    Examples:
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
      >>> rule = gum_optax.scale_by_dion(rank=2)
      >>> steps, state = rule.update(gradients, rule.init(gradients))
      >>> round(float(jnp.sum(steps["kernel"] ** 2)), 3)  # P Qᵀ has r unit columns
      2.0

    References:
      Ahn et al., Dion, arXiv 2504.05295, Algorithm 1.
    """
    rank = check_integer("rank", rank, at_least=1)
    momentum = check_number("momentum", momentum, at_least=0, below=1)

    def init(key, x):
        *blocks, rows, columns = x.shape
        q = jax.random.normal(key, (*blocks, columns, min(rank, rows)), jnp.float32)
        return zeros(x, -2, -1), placed(q * safe_reciprocal(norm(q, -2)), x, -1, q.shape[-1])

    def update(count, g, m, q):
        del count
        m = m + g
        p = _completed(exact_matmul(m, q))
        r = exact_matmul(m.mT, p)
        lengths = norm(r, -2)
        unit, seen = r * safe_reciprocal(lengths), lengths > _ROUNDINGS * _EPS * frobenius(m)
        m = m - (1 - momentum) * lift(p, r.mT)
        return lift(p, jnp.where(seen, unit, 0).mT), m, jnp.where(seen, unit, q)

    return per_matrix(DionState, init, update, key)


def _completed(y: Array) -> Array:
    """`orth(Y)`, completed by columns of the identity if `Y` does not have full rank.

    These columns enter at the size of float32's last bit, so that they do not tilt the columns of `Y`; this
    needs three shifted passes. If rounding defeats the passes, the result is columns of the identity. Nothing
    is lost then: the momentum keeps what the step does not take.
    """
    start = jnp.broadcast_to(jnp.eye(*y.shape[-2:], dtype=y.dtype), y.shape)
    q = orthonormalize(regularized(to_unit_norm(y), start, _EPS), shifted_passes=3)
    return orthonormal_or(q, start)


def dion(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    key: int | jax.Array = 0,
    momentum: float = 0.95,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Dion: one orthonormalized power iteration of the momentum per step, with error feedback.

        M ← M + G,   P = orth(M Q),   R = MᵀP,   M ← M - (1 - μ) P Rᵀ
        Q ← R, its columns to norm one,   step = √(fan_out/fan_in) P Qᵀ

    State: a full-size momentum and `Q`, `m n + n r` numbers per matrix, more than Muon.

    Args:
      learning_rate: a number or a schedule; 0.01 in the paper.
      rank: `r`, at most `m`.
      key: an integer seed or a JAX key, for the first `Q`.
      momentum: `μ`, the fraction of the momentum that stays in the directions of the step.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `muon`; also if `rank` is below 1 or not an integer.

    Examples:
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
      >>> tx = gum_optax.dion(1.0, rank=2)
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> int(np.linalg.matrix_rank(updates["kernel"], tol=1e-3))
      2

    References:
      Ahn et al., Dion, arXiv 2504.05295, Algorithm 1.
    """
    rule = scale_by_dion(rank, momentum, key)
    return matrix_optimizer(
        rule,
        learning_rate,
        fan_ratio,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        others=others,
    )
