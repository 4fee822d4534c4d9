"""H-Fac: momentum and second moment as a row and a column each."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .._core.checks import check_adam
from .._linalg.numerics import LARGEST
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._mesh.explicit import zeros
from .._transforms.factored_rms import check_divisor, clip_rms, over_root, row_and_column
from .._transforms.per_matrix import per_matrix
from .matrix_optimizer import WeightDecay, matrix_optimizer


class HFacState(NamedTuple):
    """State of `scale_by_hfac`, float32.

    Examples:
      >>> state = gum_optax.scale_by_hfac().init({"kernel": jnp.ones((4, 8))})
      >>> state.u["kernel"].shape, state.v["kernel"].shape
      ((4, 1), (1, 8))
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    u: optax.Updates  # each leaf (*blocks, m, 1): averages of the gradient over the columns
    v: optax.Updates  # each leaf (*blocks, 1, n): over the rows
    r: optax.Updates  # each leaf (*blocks, m, 1): averages of its square over the columns
    s: optax.Updates  # each leaf (*blocks, 1, n): over the rows


def scale_by_hfac(
    b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-30, threshold: Any = 1.0
) -> optax.GradientTransformationExtraArgs:
    """H-Fac's rule: see `hfac`.

    Args:
      b1, b2, eps, threshold: as in `hfac`.

    Returns:
      A transformation over trees of `(*blocks, m, n)` leaves. State: `2 (m + n)` numbers per matrix.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type; at `init`, a leaf is no matrix.

    Examples:
      >>> gradients = {"kernel": jnp.outer(jnp.arange(1.0, 5.0), jnp.arange(1.0, 9.0))}
      >>> rule = gum_optax.scale_by_hfac()
      >>> steps, state = rule.update(gradients, rule.init(gradients))
      >>> bool(jnp.allclose(steps["kernel"], 1.0, atol=1e-5))  # at rank 1 a row and a column are exact
      True
    """
    b1, b2, _ = check_adam(b1, b2, eps)
    eps, threshold = check_divisor("eps", eps), check_divisor("threshold", threshold)

    def init(key, leaf):
        del key
        return zeros(leaf, -2, 1), zeros(leaf, 1, -1), zeros(leaf, -2, 1), zeros(leaf, 1, -1)

    def update(count, g, u, v, r, s):
        t = count.astype(jnp.float32)
        # Decays that correct the bias: an average with them is the corrected average of Adam.
        beta1, beta2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
        g = jnp.clip(g, -LARGEST, LARGEST)
        (row, column), (row_squares, column_squares) = row_and_column(g), row_and_column(g * g + eps)
        u, v = beta1 * u + (1 - beta1) * row, beta1 * v + (1 - beta1) * column
        r, s = beta2 * r + (1 - beta2) * row_squares, beta2 * s + (1 - beta2) * column_squares
        phi, psi = beta1 * (u - row) / jnp.sqrt(r), beta1 * (v - column) / jnp.sqrt(s)
        return 0.5 * (phi + psi) + clip_rms(over_root(g, r, s), threshold), u, v, r, s

    return per_matrix(HFacState, init, update)


def hfac(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-30,
    threshold: float = 1.0,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """H-Fac: momentum and second moment as a row and a column each.

        u ← β̂₁ u + (1 - β̂₁) rowmean(G),        v ← β̂₁ v + (1 - β̂₁) colmean(G)
        r ← β̂₂ r + (1 - β̂₂) rowmean(G² + ε),   s ← β̂₂ s + (1 - β̂₂) colmean(G² + ε)
        φ = β̂₁ (u - rowmean(G)) / √r,           ψ = β̂₁ (v - colmean(G)) / √s
        U = G / √(r sᵀ / mean(r)),   step = (φ + ψ) / 2 + U / max(1, RMS(U) / d)

    with `β̂ = β (1 - βᵗ⁻¹) / (1 - βᵗ)`, so that no average is biased towards its start. The gradient enters
    the step whole; the momentum corrects what is constant along rows or columns. State: `2 (m + n)` numbers
    per matrix. With `b1=0` it is Adafactor's step.

    The authors published no code. The equations follow a transcription (junaidaliop/zij at 74a271e), whose
    momentum term reads the new averages, so that `β̂₁` acts on it twice; we could not compare it with the
    paper's algorithm.

    Args:
      learning_rate: a number or a schedule; the step has RMS of about 1, as Adam's.
      b1, b2: `β₁` and `β₂`; Adam's 0.9 and 0.999. The paper's values were not to be found.
      eps, threshold: `ε` and `d`; Adafactor's 1e-30 and 1. The paper's values were not to be found.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `muon`; also if `b1`, `b2`, `eps` or `threshold` is out of range.

    Examples:
      >>> params = {"kernel": jnp.ones((4, 8))}
      >>> gum_optax.memory_report(gum_optax.hfac(1e-3), params).state  # bytes
      {'u': 16, 'v': 32, 'r': 16, 's': 32, 'bookkeeping': 12}

    References:
      Nguyen et al., H-Fac, arXiv 2406.09958.
    """
    return matrix_optimizer(
        scale_by_hfac(b1, b2, eps, threshold),
        learning_rate,
        1.0,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        others=others,
    )
