"""Muon's rule, shared by several optimizers."""

from typing import Any

import optax

from .._core.checks import check_function
from .._linalg.newton_schulz import Orthogonalizer, fastest_newton_schulz
from .momentum import trace
from .orthogonalize import orthogonalize


def scale_by_muon(
    momentum: Any = 0.95,
    orthogonalizer: Orthogonalizer | None = None,
    *,
    nesterov: bool = False,
    momentum_dtype: Any = None,
    batched: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Muon's rule: orthogonalize the momentum.

        M ← β M + G,   step = NS(M)   (with `nesterov`: NS(G + β M))

    Args:
      momentum: `β` in `[0, 1)`; 0.95 as in Jordan's code.
      orthogonalizer: `fastest_newton_schulz` (the default), `polar`, or any function
        `(*, m, n) -> (*, m, n)`.
      nesterov: whether to look ahead, as Jordan's code does.
      momentum_dtype: the dtype of the stored `M`: float32 (the default), or bfloat16 or int8 with stochastic
        rounding.
      batched: as in `orthogonalize`.

    Returns:
      A transformation over trees of `(*, m, n)` leaves. State: one momentum of each leaf's size.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type.

    Examples:
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
      >>> rule = gum_optax.scale_by_muon(orthogonalizer=gum_optax.polar)
      >>> steps, state = rule.update(gradients, rule.init(gradients))
      >>> bool(jnp.allclose(steps["kernel"] @ steps["kernel"].T, jnp.eye(4), atol=1e-4))
      True

    References:
      Jordan et al., https://kellerjordan.github.io/posts/muon.
    """
    method = fastest_newton_schulz if orthogonalizer is None else orthogonalizer
    check_function("orthogonalizer", method, "gum_optax.polar")
    return optax.chain(trace(momentum, nesterov, momentum_dtype), orthogonalize(method, batched=batched))
