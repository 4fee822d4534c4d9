"""COSMOS: Adam in the leading eigenspace of the gradient, Muon outside it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .._core.checks import check_adam, check_function, check_integer, check_number
from .._linalg.newton_schulz import Orthogonalizer, newton_schulz
from .._linalg.normalizers import unit_frobenius
from .._linalg.numerics import LARGEST, exact_matmul, to_unit_norm
from .._linalg.orthonormal import lift, orthonormalize, outside, project, regularized
from .._lowrank.finders import first_subspace
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._mesh.explicit import zeros
from .._transforms.per_matrix import per_matrix
from .matrix_optimizer import WeightDecay, matrix_optimizer


class CosmosState(NamedTuple):
    """State of `scale_by_cosmos`.

    Examples:
      >>> state = gum_optax.scale_by_cosmos(rank=2).init({"kernel": jnp.ones((4, 8))})
      >>> state.basis["kernel"].shape, state.spectrum["kernel"].shape, state.squares["kernel"].shape
      ((4, 2), (2, 2), (2, 8))
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    momentum: optax.Updates  # M, each leaf (*, m, n) float32
    basis: optax.Updates  # U, each leaf (*, m, r) float32, orthonormal columns
    spectrum: optax.Updates  # S, each leaf (*, r, r) float32: the mean of UᵀG GᵀU
    squares: optax.Updates  # V, each leaf (*, r, n) float32: the mean of (UᵀG)²


def scale_by_cosmos(
    rank: int,
    ratio: Any = 0.2,
    b1: Any = 0.9,
    b2: Any = 0.96,
    eps: Any = 1e-8,
    orthogonalizer: Orthogonalizer = newton_schulz,
    key: int | jax.Array = 0,
) -> optax.GradientTransformation:
    """Adam in the leading eigenspace of `G Gᵀ`, orthogonalized momentum outside it.

        M ← β₁ M + (1 - β₁) G
        U' ← orth(β₂ U S + (1 - β₂) G GᵀU)
        S ← β₂ (U'ᵀU) S (UᵀU') + (1 - β₂) U'ᵀG GᵀU',   U ← U'
        V ← β₂ V + (1 - β₂) (UᵀG)²
        A = U (UᵀM / (1 - β₁ᵗ)) / (√(V / (1 - β₂ᵗ)) + ε),   B = NS(M - U UᵀM)
        step = norm(A + γ norm(B)),   norm: scaling to element RMS one

    `U` starts random and `S` starts at zero, so the first step is one power iteration. The authors' code
    starts from an SVD of the first gradient.

    Args:
      rank: `r`, at most `m`.
      ratio: `γ`; 0.2 in the paper.
      b1, b2, eps: `β₁`, `β₂`, `ε`; 0.9, 0.96 and 1e-8 as in the authors' code.
      orthogonalizer: a function `(*, m, n) -> (*, m, n)`.
      key: an integer seed or a JAX key, for the first `U`.

    Returns:
      A transformation over trees of `(*, m, n)` leaves. State: a full-size momentum, `U`, `S` and `V`,
      `m n + r (m + n) + r²` numbers per matrix.

    Raises:
      TypeError, ValueError: an argument or a leaf is out of range or of the wrong type.

    Examples:
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
      >>> rule = gum_optax.scale_by_cosmos(rank=2)
      >>> steps, state = rule.update(gradients, rule.init(gradients))
      >>> round(float(jnp.mean(steps["kernel"] ** 2)), 3)  # the step has element RMS one
      1.0

    References:
      Liu et al., COSMOS, arXiv 2502.17410, Algorithm 1.
    """
    rank = check_integer("rank", rank, at_least=1)
    ratio = check_number("ratio", ratio, at_least=0)
    b1, b2, eps = check_adam(b1, b2, eps)
    check_function("orthogonalizer", orthogonalizer, "gum_optax.polar")

    def init(key, x):
        k = min(rank, x.shape[-2])
        return zeros(x, -2, -1), first_subspace(key, x, k), zeros(x, k, k), zeros(x, k, -1)

    def update(count, g, m, u, s, v):
        m = b1 * m + (1 - b1) * g
        g = jnp.clip(g, -LARGEST, LARGEST)
        y = b2 * exact_matmul(u, s) + (1 - b2) * g @ project(u, g).mT
        u_new = orthonormalize(regularized(to_unit_norm(y), u))
        rotation, r = exact_matmul(u_new.mT, u), project(u_new, g)
        s = b2 * exact_matmul(exact_matmul(rotation, s), rotation.mT) + (1 - b2) * exact_matmul(r, r.mT)
        v = b2 * v + (1 - b2) * r**2
        a = lift(u_new, project(u_new, m) / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps))
        b = orthogonalizer(outside(u_new, m))
        return unit_frobenius(a + ratio * unit_frobenius(b)), m, u_new, s, v

    return per_matrix(CosmosState, init, update, key)


def cosmos(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 64,
    *,
    key: int | jax.Array = 0,
    ratio: float = 0.2,
    b1: float = 0.9,
    b2: float = 0.96,
    eps: float = 1e-8,
    orthogonalizer: Orthogonalizer | None = None,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """COSMOS: Adam in the leading eigenspace of the gradient, Muon outside it.

        U ← orth(β₂ U S + (1 - β₂) G GᵀU),   A = U Adam(UᵀG),   B = NS(M - U UᵀM)
        step = γ norm(A + γ norm(B)),   norm: scaling to element RMS one

    State: a full-size momentum, `U`, `S` and `V`, `m n + r (m + n) + r²` numbers per matrix, more than Muon.
    `scale_by_cosmos` documents the whole update.

    Args:
      learning_rate: a number or a schedule; about AdamW's.
      rank: `r`, at most `m`; 64 in the paper.
      key: an integer seed or a JAX key, for the first `U`.
      ratio: `γ`, the weight of the part outside and the size of the step; 0.2 in the paper.
      b1, b2, eps: `β₁` of the momentum, `β₂` of the second moments, Adam's `ε`; 0.9 and 0.96 as in the
        authors' code.
      orthogonalizer: `NS`, a function `(*, m, n) -> (*, m, n)`: `newton_schulz` (the default), `polar`, or
        any other.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `muon`; also if `rank` is below 1 or not an integer, `ratio` or `eps` is
        below 0, or `b1` or `b2` is outside `[0, 1)`.

    Examples:
      >>> params = {"kernel": jnp.ones((4, 8))}
      >>> gum_optax.memory_report(gum_optax.cosmos(1e-3, rank=2), params).state  # bytes
      {'momentum': 128, 'basis': 32, 'spectrum': 16, 'squares': 64, 'bookkeeping': 12}

    References:
      Liu et al., COSMOS, arXiv 2502.17410, Algorithm 1.
    """
    rule = scale_by_cosmos(
        rank, ratio, b1, b2, eps, newton_schulz if orthogonalizer is None else orthogonalizer, key
    )
    return matrix_optimizer(
        rule,
        learning_rate,
        ratio,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        others=others,
    )
