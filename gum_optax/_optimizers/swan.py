"""SWAN: standardized rows, then whitening."""

import functools
from typing import Any

import optax

from .._core.checks import check_function, check_number
from .._linalg.newton_schulz import POLAR_EXPRESS, Orthogonalizer, newton_schulz
from .._linalg.normalizers import multi_norm, outputs_first, standardize_rows, whiten
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._transforms.normalize import normalize_sequentially
from .matrix_optimizer import WeightDecay, matrix_optimizer


def swan(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: float = 0.05,
    orthogonalizer: Orthogonalizer | None = None,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SWAN: standardized rows, then whitening. It has no state for matrices.

        G̃ = (rows of G - their means) / their deviations;   O = msign(G̃);   step = α O |G̃|_F / |O|_F

    Args:
      learning_rate: a number or a schedule; 0.02 in the paper.
      scale: `α`; 0.05 in the paper.
      orthogonalizer: the function for `msign`. Default: Newton-Schulz with `POLAR_EXPRESS`. The
        paper's coupled iteration with β = 0.8 is not used: eigenvalues follow `s ← β² s (3 - s)²`, whose
        slope at its fixed point 1.75 is -1.8, so that it does not settle. `polar` is exact.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `muon`; also if `scale` is below 0.

    Examples:
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
      >>> tx = gum_optax.swan(1.0)
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> print(np.linalg.svd(updates["kernel"], compute_uv=False).round(3))  # without means, of rank 3
      [0.163 0.163 0.163 0.   ]

    References:
      Ma et al., SWAN, arXiv 2412.13148, Algorithm 1.
    """
    express = functools.partial(newton_schulz, coefficients=POLAR_EXPRESS)
    method = check_function(
        "orthogonalizer", express if orthogonalizer is None else orthogonalizer, "gum_optax.polar"
    )
    normalizer = multi_norm((standardize_rows, functools.partial(whiten, method=method)))
    rule = normalize_sequentially(outputs_first(normalizer))
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
