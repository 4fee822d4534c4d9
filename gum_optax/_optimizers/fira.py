"""Fira: GaLore plus a residual that is scaled as inside the subspace."""

from typing import Any

import jax
import optax

from .._core.checks import check_number
from .._lowrank.finders import SubspaceFinder
from .._lowrank.low_rank import low_rank
from .._lowrank.residuals import scale_as_inside
from .._lowrank.switch import track_subspace
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._transforms.momentum import scale_by_clipped_adam
from .._transforms.scaling import limit_norm_growth
from .matrix_optimizer import WeightDecay, matrix_optimizer


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    *,
    key: int | jax.Array = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    norm_growth: float = 1.01,
    find_subspace: SubspaceFinder | None = None,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore plus the residual, scaled column by column as Adam scales inside the subspace.

        R = PᵀG,   S = Adam(R),   φⱼ = |S[:, j]| / |R[:, j]|
        step = P S + φ ∘ (G - P R),   the norm of the last term growing by at most 1.01 per step

    State: `m r + 2 r n` numbers per matrix, and one number for the norm.

    Args:
      learning_rate: a number or a schedule. This optimizer has no `α`; the authors' code has an `α` inside
        the subspace, 0.25 in its C4 runs.
      rank, period, key, b1, b2, eps, find_subspace: as in `galore`.
      norm_growth: the largest ratio between the norms of successive residual terms; 1.01 in the paper.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `galore`; also if `norm_growth` is below 1.

    Examples:
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
      >>> tx = gum_optax.fira(1.0, rank=2)
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> int(np.linalg.matrix_rank(updates["kernel"], tol=1e-3))  # GaLore's step has rank 2
      4

    References:
      Chen et al., Fira, arXiv 2410.01623, Algorithm 1.
    """
    check_number("norm_growth", norm_growth, at_least=1)
    rule = low_rank(
        scale_by_clipped_adam(b1, b2, eps),
        rank,
        period,
        find_subspace=track_subspace if find_subspace is None else find_subspace,
        residual=optax.chain(scale_as_inside(), limit_norm_growth(norm_growth)),
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
