"""Muon's rule, which several optimizers run."""

from typing import Any

import optax

from .._core.checks import check_function
from .._linalg.newton_schulz import Orthogonalizer, fastest_newton_schulz
from .momentum import heavy_ball
from .orthogonalize import orthogonalize


def scale_by_muon(
    momentum: Any = 0.95,
    orthogonalizer: Orthogonalizer | None = None,
    *,
    nesterov: bool = False,
    momentum_dtype: Any = None,
    together: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Muon's rule: momentum, orthogonalized.

        R ← β R + G,   step = NS(R)   (with `nesterov`: NS(G + β R))

    Args:
      momentum: `β` in `[0, 1)`; 0.95 as in Jordan's.
      orthogonalizer: `fastest_newton_schulz` (the default), `polar`, or any function
        `(*, m, n) -> (*, m, n)`.
      nesterov: look ahead, as Jordan's code does.
      momentum_dtype: what `R` is kept in, float32 (the default), or bfloat16, rounded to stochastically.
      together: as in `orthogonalize`.

    Returns:
      A transformation over trees of `(*, m, n)` leaves. State: a momentum of their size.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type.

    References:
      Jordan et al., https://kellerjordan.github.io/posts/muon.
    """
    method = fastest_newton_schulz if orthogonalizer is None else orthogonalizer
    check_function("orthogonalizer", method, "gum_optax.polar")
    trace = heavy_ball(momentum, nesterov, momentum_dtype)
    return optax.chain(trace, orthogonalize(method, together=together))
