"""Muon: momentum, orthogonalized."""

from typing import Any

import optax

from .._linalg.newton_schulz import Orthogonalizer
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._transforms.scale_by_muon import scale_by_muon
from .._transforms.scaling import shape_factor
from .matrix_optimizer import matrix_optimizer


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    nesterov: bool = False,
    momentum_dtype: Any = None,
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
      momentum_dtype: what `R` is kept in: float32 (the default), or bfloat16, rounded to stochastically,
        which halves the state. (GUM's sampled blocks live outside the subspace; rounding puts a little of
        their momentum inside, where Newton-Schulz raises it.)
      orthogonalizer: `fastest_newton_schulz` (the default), `polar`, or any function
        `(*, m, n) -> (*, m, n)`.
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
    rule = scale_by_muon(momentum, orthogonalizer, nesterov=nesterov, momentum_dtype=momentum_dtype)
    return matrix_optimizer(
        rule,
        learning_rate,
        shape_factor(consistent_rms),
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        others=others,
    )
