"""SUMO: exactly orthogonalized momentum in a subspace."""

from typing import Any

import jax
import optax

from .._core.checks import check_number
from .._linalg.newton_schulz import Orthogonalizer
from .._linalg.polar import polar
from .._lowrank.finders import SubspaceFinder, randomized_svd
from .._lowrank.low_rank import low_rank
from .._lowrank.on_refresh import rotate
from .._lowrank.projectors import projector_dtype_beside
from .._lowrank.residuals import Residual, add_raw
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._transforms.scale_by_muon import scale_by_muon
from .._transforms.scaling import limit_norm_growth, shape_factor
from .matrix_optimizer import WeightDecay, matrix_optimizer


def sumo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    *,
    key: int | jax.Array = 0,
    momentum: float = 0.95,
    momentum_dtype: Any = None,
    find_subspace: SubspaceFinder | None = None,
    orthogonalizer: Orthogonalizer | None = None,
    residual: Residual | None = None,
    norm_growth: float = 1.1,
    consistent_rms: float | None = 0.2,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SUMO: exactly orthogonalized momentum in a subspace; the momentum rotates with the subspace.

        every K steps   P' ← r leading left singular vectors of G;   M ← (P'ᵀP) M;   P ← P'
        every step      M ← β M + PᵀG,   O = msign(M), its norm growing by at most 1.1 per step
                        step = P O + (G - P PᵀG)

    State: `r (m + n)` numbers per matrix, and one number for its norm. The rule adds the raw residual, as
    printed in the paper: the residual has the size of the gradient, not of the step.

    Args:
      learning_rate: a number or a schedule.
      rank: `r`; matrices with `m <= rank` are not projected. The default is `gum`'s.
      period: `K`; 200 as in GaLore, 250 in the paper's headline.
      key: an integer seed or a JAX key, for finders that draw.
      find_subspace: `randomized_svd` (the default), `svd_subspace`, ...
      orthogonalizer: `polar` (the default), or `polar_by_products` on accelerators.
      residual: `add_raw` (the default, the printed form) or `drop` (the other form in circulation).
      norm_growth: the largest ratio between the norms of successive steps; 1.1 in the paper.
      consistent_rms: as in `muon`. The paper does not say whether a factor of the shape applies.
      momentum, momentum_dtype: as in `muon`; `β` is `momentum`.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `galore_muon`; also if `norm_growth` is below 1.

    Examples:
      >>> params = {"kernel": jnp.ones((4, 8))}
      >>> gum_optax.memory_report(gum_optax.sumo(1e-3, rank=2), params).state  # bytes
      {'projectors': 32, 'trace': 64, 'norms': 4, 'bookkeeping': 32}

    References:
      Refael et al., SUMO, arXiv 2505.24749, Algorithm 1.
    """
    check_number("norm_growth", norm_growth, at_least=1)
    inner = optax.chain(
        scale_by_muon(
            momentum, polar if orthogonalizer is None else orthogonalizer, momentum_dtype=momentum_dtype
        ),
        limit_norm_growth(norm_growth),
    )
    rule = low_rank(
        inner,
        rank,
        period,
        find_subspace=randomized_svd if find_subspace is None else find_subspace,
        on_refresh=rotate,
        residual=add_raw if residual is None else residual,
        key=key,
        projector_dtype=projector_dtype_beside(momentum_dtype),
    )
    return matrix_optimizer(
        rule,
        learning_rate,
        shape_factor(consistent_rms),
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        others=others,
    )
