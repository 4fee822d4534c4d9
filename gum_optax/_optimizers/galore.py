"""GaLore and GaLore-Muon: a rule in the top singular subspace of the gradient."""

from typing import Any

import jax
import optax

from .._core.checks import check_number
from .._linalg.newton_schulz import Orthogonalizer
from .._lowrank.finders import SubspaceFinder
from .._lowrank.low_rank import low_rank
from .._lowrank.on_refresh import OnRefresh, keep
from .._lowrank.projectors import projector_dtype_beside
from .._lowrank.switch import track_subspace
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._transforms.momentum import scale_by_clipped_adam
from .._transforms.scale_by_muon import scale_by_muon
from .._transforms.scaling import shape_factor
from .matrix_optimizer import WeightDecay, matrix_optimizer


def galore_muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    *,
    key: int | jax.Array = 0,
    momentum: float = 0.95,
    momentum_dtype: Any = None,
    find_subspace: SubspaceFinder | None = None,
    on_refresh: OnRefresh | None = None,
    orthogonalizer: Orthogonalizer | None = None,
    consistent_rms: float | None = 0.2,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore-Muon: Muon in the top singular subspace of the gradient.

        every K steps   P ← top r left singular vectors of G        (the momentum: see on_refresh)
        every step      M ← β M + PᵀG,   step = P NS(M)

    The rule is biased, because it loses the gradient outside the subspace: with more noise than signal it can
    stall for good (`examples/linear_regression.py`). State: `r (m + n)` numbers per matrix.

    Args:
      learning_rate: a number or a schedule.
      rank: `r`; matrices with `m <= rank` run plain Muon.
      period: `K`; 200 as in GaLore.
      key: an integer seed or a JAX key, for finders that draw.
      find_subspace: `track_subspace` (the default: two power steps at first, then one step of
        `subspace_iteration` at each refresh) or `svd_subspace` (as in the paper).
      on_refresh: what becomes of the momentum: `keep` (the default, as in GaLore), `restart`, or `rotate`
        into the new subspace, which ended 0.013 lower over a million tokens and 0.008 over five million
        (docs/results/longer_runs.md).
      momentum, momentum_dtype, orthogonalizer, consistent_rms: as in `muon`.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `muon`; also if `rank` or `period` is below 1 or not an integer.

    Examples:
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (4, 16))}
      >>> tx = gum_optax.galore_muon(1.0, rank=2, orthogonalizer=gum_optax.polar)
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> print(np.linalg.svd(updates["kernel"], compute_uv=False).round(3))  # 0.2 √16, in two directions
      [0.8 0.8 0.  0. ]

    References:
      Zhao et al., GaLore, arXiv 2403.03507, Algorithm 2; Pan et al., arXiv 2510.17802, section 3.
    """
    rule = low_rank(
        scale_by_muon(momentum, orthogonalizer, momentum_dtype=momentum_dtype, batched=True),
        rank,
        period,
        find_subspace=track_subspace if find_subspace is None else find_subspace,
        on_refresh=keep if on_refresh is None else on_refresh,
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
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam in the top singular subspace of the gradient.

        every K steps   P ← top r left singular vectors of G        (the moments stay unchanged)
        every step      R = PᵀG,   step = α P Adam(R)

    State: `m r + 2 r n` numbers per matrix. The rule loses the gradient outside the subspace.

    Args:
      learning_rate: a number or a schedule; 0.01 in the paper's C4 runs.
      rank: `r`; matrices with `m <= rank` run Adam on the full matrix.
      period: `K`; 200 in the paper.
      key: an integer seed or a JAX key, for finders that draw.
      scale: `α`; 0.25 in the paper.
      b1, b2, eps: Adam's.
      find_subspace: `track_subspace` (the default) or `svd_subspace` (as in the paper).
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `galore_muon`; also if `scale` or `eps` is below 0, or `b1` or `b2` is
        outside `[0, 1)`.

    Examples:
      >>> gradients = {"kernel": jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))}
      >>> tx = gum_optax.galore(1.0, rank=2, find_subspace=gum_optax.svd_subspace)
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> print(np.linalg.norm(updates["kernel"], axis=1).round(3))  # two rows are outside the subspace
      [0.25 0.25 0.   0.  ]

    References:
      Zhao et al., GaLore, arXiv 2403.03507, Algorithm 2.
    """
    finder = track_subspace if find_subspace is None else find_subspace
    rule = low_rank(scale_by_clipped_adam(b1, b2, eps), rank, period, find_subspace=finder, key=key)
    return matrix_optimizer(
        rule,
        learning_rate,
        check_number("scale", scale, at_least=0),
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        others=others,
    )
