"""SinkGD: scales rows and columns of the gradient to constant norms."""

import functools
from typing import Any

import optax

from .._core.checks import check_integer, check_number
from .._linalg.normalizers import sinkhorn_together
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._transforms.normalize import normalize_lean
from .matrix_optimizer import WeightDecay, matrix_optimizer


def sinkgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: float = 0.05,
    rounds: int = 5,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SinkGD: scales rows and columns of the gradient to constant norms in turn. It has no state for
    matrices.

        repeat `rounds` times:   rows to ℓ2-norm √n, then columns to √m;   step = α X

    Args:
      learning_rate: a number or a schedule; 0.02 in the paper.
      scale: `α`; 0.05 in the paper.
      rounds: 5 in the paper.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `muon`; also if `scale` is below 0, or `rounds` below 1.

    Examples:
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
      >>> tx = gum_optax.sinkgd(1.0)
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> round(float(jnp.sqrt(jnp.mean(updates["kernel"] ** 2))), 3)  # α
      0.05

    References:
      Scetbon et al., SinkGD, arXiv 2502.06742, Algorithm 4.
    """
    check_integer("rounds", rounds, at_least=1)
    # A Flax kernel has outputs as columns; the paper's matrices have them as rows.
    rule = normalize_lean(functools.partial(sinkhorn_together, rounds=rounds, first=-2))
    return matrix_optimizer(
        rule,
        learning_rate,
        check_number("scale", scale, at_least=0),
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        others=others,
        wide=False,
    )
