"""Optimizers in a subspace: each a rule for the matrices, and AdamW for the rest."""

from typing import Any

import jax
import optax

from ._carries import rotate
from ._checks import check_number
from ._dimensions import WeightDimensionNumbers
from ._full_rank import adam_rule, chosen, muon_rule
from ._low_rank import low_rank
from ._orthogonalize import Orthogonalizer, polar
from ._residuals import Residual, add_raw
from ._routing import by_constant, by_shape, matrices_and_others
from ._scaling import limit_norm_growth
from ._subspace import SubspaceFinder, randomized_svd
from ._switch import track_subspace
from ._unbiased import Compensation, complement, unbiased_low_rank


def galore_muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    *,
    key: int | jax.Array = 0,
    momentum: float = 0.95,
    momentum_dtype: Any = None,
    find_subspace: SubspaceFinder | None = None,
    orthogonalizer: Orthogonalizer | None = None,
    consistent_rms: float | None = 0.2,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore-Muon: Muon in the top singular subspace of the gradient.

        every K steps   P ← top r left singular vectors of G        (the momentum is kept as it is)
        every step      R ← β R + PᵀG,   step = P NS(R)

    What lies outside the subspace is lost, so this is biased: where the noise is larger than the
    signal it can stall for good (`examples/linear_regression.py`). State: `r (m + n)` numbers a matrix.

    Args:
      learning_rate: a number or a schedule.
      rank: `r`; matrices with `m <= rank` run plain Muon.
      period: `K`; 200 as in GaLore.
      key: an integer seed or a JAX key, for finders that draw.
      find_subspace: `track_subspace` (the default: two power steps at first, then one step of
        `subspace_iteration` at each refresh), `svd_subspace` (the paper's).
      momentum, momentum_dtype, orthogonalizer, consistent_rms, weight_decay, weight_decay_mask,
        weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as `muon`; also `rank` or `period` below 1 or not an integer.

    References:
      Zhao et al., GaLore, arXiv 2403.03507, Algorithm 2; Pan et al., arXiv 2510.17802, section 3.
    """
    rule = low_rank(
        muon_rule(momentum, orthogonalizer, dtype=momentum_dtype, together=True),
        rank,
        period,
        find_subspace=chosen(find_subspace, track_subspace),
        key=key,
    )
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(rule, learning_rate, by_shape(consistent_rms), *shared)


def gum(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    full_rank_fraction: float = 1 / 16,
    *,
    key: int | jax.Array = 0,
    momentum: float = 0.95,
    momentum_dtype: Any = None,
    find_subspace: SubspaceFinder | None = None,
    compensation: Compensation | None = None,
    orthogonalizer: Orthogonalizer | None = None,
    consistent_rms: float | None = 0.2,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GUM: GaLore Unbiased with Muon.

        every K steps   P ← top r left singular vectors of G;  draw γ of the L blocks of each
                        shape;  R ← 0
        low-rank block  R ← β R + PᵀG/(1-q)           step = P NS(R)      R is r × n
        sampled block   R ← β R + (G - P PᵀG)/q       step = NS(R)        R is m × n,   q = γ/L

    What Muon's rule is fed has the gradient as its mean over the draw. State: `r (m + n) + q m n`
    numbers a matrix, the full-rank momenta in γ slots a shape.

    Args:
      learning_rate: a number or a schedule of the steps taken: a step that is skipped, for a gradient that is
        not finite, does not count. (A schedule given by way of `optax.inject_hyperparams` counts it.)
      rank: `r`; 128 as in the paper. Matrices with `m <= rank` run plain Muon.
      period: `K`; 200 as in the paper.
      full_rank_fraction: the asked `q`; a shape with L blocks gets `γ = clip(round(q L), 1, L)` slots
        (0 only for 0), and one with a single block runs plain Muon. The paper's is 2 of L layers.
      key: an integer seed or a JAX key: the draws of period `p` are a function of it and `p`.
      compensation: `complement` (the default, the paper's) or `low_variance`.
      find_subspace: `track_subspace` (the default), `svd_subspace` (the paper's).
      momentum, momentum_dtype, orthogonalizer, consistent_rms, weight_decay, weight_decay_mask,
        weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as `galore_muon`; also `full_rank_fraction` outside `[0, 1]`.

    References:
      Pan et al., Unbiased Gradient Low-Rank Projection, arXiv 2510.17802, Algorithm 2.
    """
    rule = unbiased_low_rank(
        muon_rule(momentum, orthogonalizer, dtype=momentum_dtype, together=True),
        rank,
        period,
        full_rank_fraction,
        find_subspace=chosen(find_subspace, track_subspace),
        compensation=chosen(compensation, complement),
        key=key,
    )
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(rule, learning_rate, by_shape(consistent_rms), *shared)


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    *,
    key: int | jax.Array = 0,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    find_subspace: SubspaceFinder | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam in the top singular subspace of the gradient.

        every K steps   P ← top r left singular vectors of G        (the moments are kept as they are)
        every step      R = PᵀG,   step = α P Adam(R)

    State: `m r + 2 r n` numbers a matrix. What lies outside the subspace is lost.

    Args:
      learning_rate: a number or a schedule; 0.01 in the paper's C4 runs.
      rank: `r`; matrices with `m <= rank` run Adam on the full matrix.
      period: `K`; 200 in the paper.
      key: an integer seed or a JAX key, for finders that draw.
      scale: `α`; 0.25 in the paper.
      b1, b2, eps: Adam's.
      find_subspace: `track_subspace` (the default), `svd_subspace` (the paper's).
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as `galore_muon`; also `scale` or `eps` below 0, `b1` or `b2` outside `[0, 1)`.

    References:
      Zhao et al., GaLore, arXiv 2403.03507, Algorithm 2.
    """
    finder = chosen(find_subspace, track_subspace)
    rule = low_rank(adam_rule(b1, b2, eps), rank, period, find_subspace=finder, key=key)
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(rule, learning_rate, by_constant(scale), *shared)


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
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SUMO: exactly orthogonalized momentum in a subspace, rotated with it.

        every K steps   Q' ← r leading left singular vectors of G;   M ← (Q'ᵀQ) M;   Q ← Q'
        every step      M ← μ M + QᵀG,   O = msign(M), its norm growing by at most 1.1 a step
                        step = Q O + (G - Q QᵀG)

    State: `r (m + n)` numbers a matrix, and one for its norm. The residual is added raw, as printed: its
    size is the gradient's, not the step's.

    Args:
      learning_rate: a number or a schedule. The paper leaves open whether the shape factor applies.
      rank: `r`; matrices with `m <= rank` are not projected.
      period: `K`; 250 in the paper's headline.
      key: an integer seed or a JAX key, for finders that draw.
      find_subspace: `randomized_svd` (the default), `svd_subspace`, ...
      orthogonalizer: `polar` (the default), or `polar_by_products` on accelerators.
      residual: `add_raw` (the default, the printed form) or `drop` (the other form in circulation).
      norm_growth: the limiter's ratio.
      momentum, momentum_dtype, consistent_rms, weight_decay, weight_decay_mask, weight_dimension_numbers,
        others: as in `muon`.

    Raises:
      TypeError, ValueError: as `galore_muon`; also `norm_growth` below 1.

    References:
      Refael et al., SUMO, arXiv 2505.24749, Algorithm 1.
    """
    check_number("norm_growth", norm_growth, at_least=1)
    inner = optax.chain(
        muon_rule(momentum, chosen(orthogonalizer, polar), dtype=momentum_dtype),
        limit_norm_growth(norm_growth),
    )
    rule = low_rank(
        inner,
        rank,
        period,
        find_subspace=chosen(find_subspace, randomized_svd),
        carry=rotate,
        residual=chosen(residual, add_raw),
        key=key,
    )
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(rule, learning_rate, by_shape(consistent_rms), *shared)
