"""GUM: GaLore Unbiased with Muon."""

from typing import Any

import jax
import optax

from .._linalg.newton_schulz import Orthogonalizer
from .._lowrank.finders import SubspaceFinder
from .._lowrank.projectors import projector_dtype_beside
from .._lowrank.switch import track_subspace
from .._lowrank.unbiased import Compensation, complement, unbiased_low_rank
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._transforms.scale_by_muon import scale_by_muon
from .._transforms.scaling import shape_factor
from .matrix_optimizer import WeightDecay, matrix_optimizer


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
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GUM: GaLore Unbiased with Muon.

        every K steps   P ← top r left singular vectors of G;  draw γ of the L blocks of each
                        shape;  M ← 0
        low-rank block  M ← β M + PᵀG/(1-q)           step = P NS(M)      M is r × n
        sampled block   M ← β M + (G - P PᵀG)/q       step = NS(M)        M is m × n,   q = γ/L

    The mean of the rule's input over the draw is the gradient. State: `r (m + n) + q m n` numbers per matrix;
    the full-rank momenta are in γ slots per shape.

    Args:
      learning_rate: a number or a schedule. The schedule does not count a step that is skipped because its
        gradient is not finite. (A schedule in `optax.inject_hyperparams` does count it.)
      rank: `r`; 128 as in the paper. Matrices with `m <= rank` run plain Muon.
      period: `K`; 200 as in the paper.
      full_rank_fraction: the requested `q`. A shape with L blocks gets `γ = clip(round(q L), 1, L)` slots
        (0 only for 0), and a shape with a single block runs plain Muon. The paper samples 2 of L layers.
      key: an integer seed or a JAX key; the draws of period `p` are a function of the key and `p`.
      compensation: `complement` (the default, as in the paper) or `low_variance`.
      find_subspace: `track_subspace` (the default) or `svd_subspace` (as in the paper).
      momentum, momentum_dtype, orthogonalizer, consistent_rms: as in `muon`.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `galore_muon`; also if `full_rank_fraction` is outside `[0, 1]`.

    Examples:
      >>> params = {"kernel": jnp.ones((8, 4, 16))}  # 8 layers
      >>> tx = gum_optax.gum(1e-3, rank=2, full_rank_fraction=0.25)
      >>> leaf = gum_optax.describe(tx, params).leaves[0]
      >>> leaf.blocks, leaf.rank, leaf.slots
      ('8 of 4 × 16', 2, '2 of 8')

    References:
      Pan et al., Unbiased Gradient Low-Rank Projection, arXiv 2510.17802, Algorithm 2.
    """
    rule = unbiased_low_rank(
        scale_by_muon(momentum, orthogonalizer, momentum_dtype=momentum_dtype, batched=True),
        rank,
        period,
        full_rank_fraction,
        find_subspace=track_subspace if find_subspace is None else find_subspace,
        compensation=complement if compensation is None else compensation,
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
