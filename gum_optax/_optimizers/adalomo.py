"""AdaLomo: Adafactor's step of the size of the parameters, without a momentum."""

import optax

from .._matrices.as_matrices import as_matrices
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._transforms.factored_rms import clip_by_rms, scale_by_factored_rms, scale_by_parameter_rms
from .matrix_optimizer import WeightDecay, checked_decay, decayed_weights, matrix_optimizer
from .others_by_kind import ByKind, as_rows, others_by_kind


def adalomo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay_rate: float = 0.8,
    eps: float = 1e-30,
    parameter_eps: float = 1e-3,
    threshold: float = 1.0,
    weight_decay: WeightDecay = 0.0,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaLomo: Adafactor's step of the size of the parameters, without a momentum.

        S = G² + ε₁
        r ← β r + (1 - β) mean(S over columns),   c ← β c + (1 - β) mean(S over rows),   β = 1 - t^-0.8
        U = G / √(r cᵀ / mean(r)),   U ← U / max(1, RMS(U) / d)
        W ← W - η ρ (U + λ W),   ρ = max(ε₂, RMS(W))

    State: `m + n` numbers per matrix. Embeddings and heads are matrices here too; a vector, and each row of a
    matrix that dimension numbers exclude, has a full second moment and a size of its own. With
    `layerwise_update` this is the authors' fused backward pass, which holds one layer's gradient at a time.
    Clip no gradients by their global norm: the step has a size of its own.

    Equation and defaults are those of the authors' code, which has the root and the growing `β`; Algorithm 1
    of the paper has neither.

    Args:
      learning_rate: `η`, a number or a schedule, relative to the size of the weights; 1e-3 in the authors'
        code, 5e-4 in their instruction tuning.
      decay_rate: how fast `β` goes to 1.
      eps, parameter_eps, threshold: `ε₁`, `ε₂` and `d`.
      weight_decay: `λ`, or a rule such as `cautious_weight_decay(λ)`, for all leaves. Unlike elsewhere in
        this library it is multiplied by `ρ`, as in the authors' code.
      weight_dimension_numbers, others: as in `muon`.

    Returns:
      A transformation over the parameters of a model, which its update needs.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type; as for `muon`.

    Examples:
      >>> params, gradients = {"kernel": jnp.full((4, 8), 2.0)}, {"kernel": jnp.full((4, 8), 1e-3)}
      >>> tx = gum_optax.adalomo(0.1)
      >>> updates, state = tx.update(gradients, tx.init(params), params)
      >>> round(float(updates["kernel"][0, 0]), 3)  # a tenth of the weight, whatever the gradient
      -0.2

    References:
      Lv et al., AdaLomo, arXiv 2310.10195, and OpenLMLab/LOMO at 45d4bac, `lomo_optim/adalomo.py`.
    """
    rule = optax.chain(
        scale_by_factored_rms(decay_rate, eps),
        clip_by_rms(threshold),
        decayed_weights(checked_decay(weight_decay), None),
        scale_by_parameter_rms(parameter_eps),
    )

    def others_rule(kinds):
        # The factors of a table do not depend on which of its sides is the fan-in.
        tables = as_matrices(rule)
        return others_by_kind(kinds, tables, heads=lambda _: tables, vectors=as_rows(rule))

    return matrix_optimizer(
        rule,
        learning_rate,
        1.0,
        weight_dimension_numbers=weight_dimension_numbers,
        others=others,
        others_rule=ByKind(others_rule),
    )
