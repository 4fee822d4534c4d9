"""FRUGAL: Adam in a subspace, and a stateless rule outside it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._lowrank.finders import SubspaceFinder
from .._lowrank.low_rank import low_rank
from .._lowrank.on_refresh import restart
from .._lowrank.residuals import Residual
from .._lowrank.switch import track_subspace
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._transforms.momentum import scale_by_clipped_adam
from .._transforms.normalize import normalize
from .matrix_optimizer import WeightDecay, matrix_optimizer


def frugal(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    *,
    key: int | jax.Array = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    find_subspace: SubspaceFinder | None = None,
    residual: Residual | None = None,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """FRUGAL: Adam in a subspace, and a stateless rule outside it.

        every K steps   P ← top r left singular vectors of G;   Adam starts again
        every step      R = PᵀG,   step = P Adam(R) + sign(G - P R)

    State: `m r + 2 r n` numbers per matrix.

    Args:
      learning_rate: a number or a schedule, for both parts; about AdamW's.
      rank, period, key, b1, b2, eps, find_subspace: as in `galore`.
      residual: the rule outside the subspace; default: the sign. An orthogonalized step of the same size is
        `normalize(multi_norm((newton_schulz, unit_frobenius)))`.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `galore_muon`; also if `b1` or `b2` is outside `[0, 1)`, or `eps` below 0.

    Examples:
      >>> gradients = {"kernel": jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))}
      >>> tx = gum_optax.frugal(1.0, rank=2, find_subspace=gum_optax.svd_subspace)
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> print(np.linalg.norm(updates["kernel"], axis=1).round(3))  # Adam for two rows, signs for two
      [1. 1. 1. 1.]

    References:
      Zmushko et al., FRUGAL, arXiv 2411.07837, Algorithm 1.
    """
    rule = low_rank(
        scale_by_clipped_adam(b1, b2, eps),
        rank,
        period,
        find_subspace=track_subspace if find_subspace is None else find_subspace,
        on_refresh=restart,
        residual=normalize(jnp.sign) if residual is None else residual,
        key=key,
    )
    return matrix_optimizer(
        rule,
        learning_rate,
        1.0,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        others=others,
    )
