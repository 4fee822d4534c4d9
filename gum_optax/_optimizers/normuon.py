"""NorMuon: orthogonalized momentum with a step size for each neuron."""

from typing import Any

import optax

from .._linalg.newton_schulz import Orthogonalizer
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._transforms.scale_by_muon import scale_by_muon
from .._transforms.scale_by_neuron_rms import scale_by_neuron_rms
from .._transforms.scaling import scale_by_shape
from .matrix_optimizer import WeightDecay, matrix_optimizer


def normuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    nesterov: bool = False,
    momentum_dtype: Any = None,
    orthogonalizer: Orthogonalizer | None = None,
    consistent_rms: float | None = 0.2,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """NorMuon: orthogonalized momentum with a step size for each neuron.

        M ← β M + G,   O = NS(M)
        v ← β₂ v + (1 - β₂) mean(O²)         the mean over the inputs of each neuron
        Ô = O / (√v + ε),   step = Ô |O|_F / |Ô|_F

    For an exact orthogonalizer and a momentum of full rank the scaled step is the paper's
    `0.2 √(m n) Ô / |Ô|_F`; otherwise it is shorter, as Muon's is. State: `m n` numbers per matrix and one for
    each output.

    Args:
      learning_rate: a number or a schedule; the same as for `muon`.
      b2: `β₂` in `[0, 1)`; 0.95 as in the paper's code.
      eps: `ε`; 1e-8 as in microsoft/dion.
      momentum, nesterov, momentum_dtype, orthogonalizer, consistent_rms: as in `muon`.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `muon`; also if `b2` or `eps` is out of range.

    Examples:
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
      >>> tx = gum_optax.normuon(1.0)
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> norms = jnp.linalg.norm(updates["kernel"], axis=0)  # one for each neuron
      >>> round(float(norms.max() / norms.min()), 3)
      1.0

    References:
      Li et al., NorMuon, arXiv 2510.05491, Algorithm 1.
    """
    rule = scale_by_muon(momentum, orthogonalizer, nesterov=nesterov, momentum_dtype=momentum_dtype)
    return matrix_optimizer(
        rule,
        learning_rate,
        optax.chain(scale_by_neuron_rms(b2, eps), scale_by_shape(consistent_rms=consistent_rms)),
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        others=others,
    )
