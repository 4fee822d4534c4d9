"""The optimizers: each a rule for the matrices, and AdamW for the rest.

A choice is a function, but its default here is `None`: `optax.inject_hyperparams` takes every function
among the arguments, defaults too, for a schedule.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._checks import check_function, check_number
from ._dimensions import WeightDimensionNumbers
from ._low_rank import low_rank
from ._orthogonalize import Orthogonalizer, newton_schulz, orthogonalize
from ._routing import matrices_and_others
from ._subspace import SubspaceFinder, subspace_iteration
from ._unbiased import Compensation, complement, unbiased_low_rank


def _chosen(choice: Any, default: Any) -> Any:
    return default if choice is None else choice


def _muon_rule(momentum: Any, orthogonalizer: Orthogonalizer | None, nesterov: bool = False):
    """Muon's rule: `R ← β R + G,  step = NS(R)`, heavy ball in float32."""
    check_number("momentum", momentum, at_least=0, below=1)
    method = check_function("orthogonalizer", _chosen(orthogonalizer, newton_schulz), "gum_optax.polar")
    trace = optax.trace(momentum, nesterov=nesterov, accumulator_dtype=jnp.float32)
    return optax.chain(trace, orthogonalize(method))


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    nesterov: bool = False,
    orthogonalizer: Orthogonalizer | None = None,
    consistent_rms: float | None = 0.2,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon: momentum, orthogonalized.

        R ← β R + G,   step = NS(R)   (with `nesterov`: NS(G + β R))

    State: one full-size momentum a matrix, `m n` numbers.

    Args:
      learning_rate: a number or a schedule; about AdamW's with `consistent_rms`.
      momentum: `β` in `[0, 1)`; 0.95 as in Jordan's.
      nesterov: look ahead, as Jordan's code does.
      orthogonalizer: `newton_schulz` (the default), `polar`, or any function `(*, m, n) -> (*, m, n)`.
      consistent_rms: step times `0.2 √max(fan_in, fan_out)` (Moonlight); `None`: times
        `√max(1, fan_out/fan_in)` (Jordan).
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in all optimizers of this
        library: decoupled decay, its mask, which leaves are matrices along which axes (default:
        `hidden_matrices`), and the rule of all other leaves (default: AdamW at `learning_rate`).

    Raises:
      TypeError, ValueError: an argument out of range or of the wrong type; at `init`, dimension
        numbers that do not fit a leaf, or a complex or integer matrix.

    References:
      Jordan et al., https://kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982.
    """
    rule = _muon_rule(momentum, orthogonalizer, nesterov)
    return matrices_and_others(
        rule, learning_rate, consistent_rms, weight_decay, weight_decay_mask, weight_dimension_numbers, others
    )


def galore_muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    *,
    key: int | jax.Array = 0,
    momentum: float = 0.95,
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
      find_subspace: `subspace_iteration` (the default: warm start, fast), `svd_subspace` (the paper's).
      momentum, orthogonalizer, consistent_rms, weight_decay, weight_decay_mask,
        weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as `muon`; also `rank` or `period` below 1 or not an integer.

    References:
      Zhao et al., GaLore, arXiv 2403.03507, Algorithm 2; Pan et al., arXiv 2510.17802, section 3.
    """
    rule = low_rank(
        _muon_rule(momentum, orthogonalizer),
        rank,
        period,
        find_subspace=_chosen(find_subspace, subspace_iteration),
        key=key,
    )
    return matrices_and_others(
        rule, learning_rate, consistent_rms, weight_decay, weight_decay_mask, weight_dimension_numbers, others
    )


def gum(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    full_rank_fraction: float = 1 / 16,
    *,
    key: int | jax.Array = 0,
    momentum: float = 0.95,
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
      learning_rate: a number or a schedule.
      rank: `r`; 128 as in the paper. Matrices with `m <= rank` run plain Muon.
      period: `K`; 200 as in the paper.
      full_rank_fraction: the asked `q`; a shape with L blocks gets `γ = clip(round(q L), 1, L)` slots
        (0 only for 0), and one with a single block runs plain Muon. The paper's is 2 of L layers.
      key: an integer seed or a JAX key: the draws of period `p` are a function of it and `p`.
      compensation: `complement` (the default, the paper's) or `low_variance`.
      find_subspace: as in `galore_muon`.
      momentum, orthogonalizer, consistent_rms, weight_decay, weight_decay_mask,
        weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as `galore_muon`; also `full_rank_fraction` outside `[0, 1]`.

    References:
      Pan et al., Unbiased Gradient Low-Rank Projection, arXiv 2510.17802, Algorithm 2.
    """
    rule = unbiased_low_rank(
        _muon_rule(momentum, orthogonalizer),
        rank,
        period,
        full_rank_fraction,
        find_subspace=_chosen(find_subspace, subspace_iteration),
        compensation=_chosen(compensation, complement),
        key=key,
    )
    return matrices_and_others(
        rule, learning_rate, consistent_rms, weight_decay, weight_decay_mask, weight_dimension_numbers, others
    )
