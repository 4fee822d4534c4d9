"""Muon's rule, which several optimizers run."""

from typing import Any

import optax

from .._core.checks import check_function
from .._linalg.newton_schulz import Orthogonalizer, fastest_newton_schulz
from .momentum import heavy_ball
from .orthogonalize import orthogonalize


def muon_rule(
    momentum: Any,
    orthogonalizer: Orthogonalizer | None,
    nesterov: bool = False,
    *,
    dtype: Any = None,
    together: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Muon's rule: `R ← β R + G,  step = NS(R)`, the heavy ball kept in `dtype`."""
    method = check_function(
        "orthogonalizer",
        fastest_newton_schulz if orthogonalizer is None else orthogonalizer,
        "gum_optax.polar",
    )
    return optax.chain(heavy_ball(momentum, nesterov, dtype), orthogonalize(method, together=together))
