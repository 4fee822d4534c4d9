"""Muon: orthogonalized momentum."""

from typing import Any

import optax

from .._linalg.newton_schulz import Orthogonalizer
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._transforms.scale_by_muon import scale_by_muon
from .._transforms.scaling import shape_factor
from .matrix_optimizer import WeightDecay, matrix_optimizer


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    nesterov: bool = False,
    momentum_dtype: Any = None,
    orthogonalizer: Orthogonalizer | None = None,
    consistent_rms: float | None = 0.2,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon: orthogonalized momentum.

        M ← β M + G,   step = NS(M)   (with `nesterov`: NS(G + β M))

    State: one full-size momentum per matrix, `m n` numbers.

    Args:
      learning_rate: a number or a schedule; with `consistent_rms`, one to four times AdamW's.
      momentum: `β` in `[0, 1)`; 0.95 as in Jordan's code.
      nesterov: whether to look ahead, as Jordan's code does.
      momentum_dtype: the dtype of the stored `M`: float32 (the default), or bfloat16 or int8 with stochastic
        rounding, which take a half and 0.26 of the state. In int8, 128 numbers of a row share a scale, and
        projectors are int8, too. (The momentum of GUM's sampled blocks lies outside the subspace. Rounding
        moves a little of it inside, where Newton-Schulz amplifies it.)
      orthogonalizer: `fastest_newton_schulz` (the default), `polar`, or any function
        `(*, m, n) -> (*, m, n)`.
      consistent_rms: 0.2 multiplies the step by `0.2 √max(fan_in, fan_out)` (Moonlight); `None` multiplies it
        by `√max(1, fan_out/fan_in)` (Jordan).
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in all optimizers of this
        library: decoupled decay, a number or a rule such as `cautious_weight_decay(0.1)`, its mask, which
        leaves are matrices along which axes (default: `hidden_matrices`), and the transformation for all
        other leaves (default: AdamW at `learning_rate`).

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type; at `init`, dimension numbers do
        not fit a leaf, or a matrix is complex or integer.

    Examples:
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (4, 16))}
      >>> tx = gum_optax.muon(1.0, orthogonalizer=gum_optax.polar)
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> print(np.linalg.svd(updates["kernel"], compute_uv=False).round(3))  # 0.2 √16
      [0.8 0.8 0.8 0.8]

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
