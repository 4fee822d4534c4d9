"""Orthonormal columns: how to compute them, project onto their span, and lift from it."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.xla import one_by_one_on_cpu
from .numerics import exact_matmul, frobenius


def inverse_factor(gram: Float[Array, "*b r r"]) -> Float[Array, "*b r r"]:
    """`L⁻¹`, where `L Lᵀ` is the Gram matrix (Cholesky)."""

    def inverse(a):
        eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
        factor = jax.lax.linalg.cholesky(a, symmetrize_input=False)
        return jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)

    return one_by_one_on_cpu(inverse, gram)


# Cholesky-QR squares the condition number, so float32 needs a shift in the first pass and two clean
# passes after it. The result is orthonormal to rounding up to condition 1e6 (Fukaya et al., shifted
# CholeskyQR3).
_SHIFT = 1e-6
_CLEAN_PASSES = 2
# How much of the previous subspace a power step keeps. Directions that G lacks (rank-deficient, zero) come
# only from there. The floor bounds the condition of `Y = G GᵀP + δ P` by 1e5, because `PᵀY ≥ δ I`.
_FLOOR = 1e-5
# A column whose squared length differs from one by more was not orthonormalized; that of an orthonormal one
# differs by rounding. Any number well between rounding and one.
_LARGEST_DEFECT = 0.1
# The rounding of two float32 products, in units of float32's eps: six times the measured 1.3, see `outside`.
_PRODUCT_ROUNDINGS = 8.0


def project(p: Float[Array, "*b m r"], g: Float[Array, "*b m n"]) -> Float[Array, "*b r n"]:
    """The coordinates of `g` in the subspace: `R = Pᵀ G`, in float32."""
    return (p.mT @ g).astype(jnp.float32)


def lift(p: Float[Array, "*b m r"], x: Float[Array, "*b r n"]) -> Float[Array, "*b m n"]:
    """The full matrix of coordinates `X`: `P X`."""
    return p @ x


def outside(
    p: Float[Array, "*b m r"], g: Float[Array, "*b m n"], eps: float | None = None
) -> Float[Array, "*b m n"]:
    """The residual `G - P Pᵀ G`, and exactly zero where only rounding of `G` remains.

    An orthogonalizer would scale that rounding up to a full-size random step. Projecting twice makes the
    error relative to the residual itself, not to `G`. A gradient in bfloat16 is projected once: its residual
    is kept from 0.008 of `|G|` on, and the rounding of float32 products is 1e-4 of that.

    Args:
      p: orthonormal columns.
      g: the gradient.
      eps: the machine epsilon of the dtype that computed the gradient, where that is coarser than `g`'s.
    """
    stored = float(jnp.finfo(g.dtype).eps) if eps is None else eps
    rounding = stored + _PRODUCT_ROUNDINGS * float(jnp.finfo(jnp.float32).eps)
    whole = frobenius(g)
    g = g.astype(jnp.float32)
    for _ in range(1 if stored >= float(jnp.finfo(jnp.bfloat16).eps) else 2):
        g = g - exact_matmul(p, exact_matmul(p.mT, g))
    return jnp.where(frobenius(g) > rounding * whole, g, 0)


def straighten(p: Float[Array, "*b m r"]) -> Float[Array, "*b m r"]:
    """Columns that are orthonormal to rounding, from columns that nearly are.

        P ← P (3 I - PᵀP) / 2,   twice

    A step of Newton-Schulz takes an error `|PᵀP - I|` of e to less than e²: from a hundredth two steps reach
    the rounding of float32. There is no factorization, and a few products suffice.
    """
    eye = jnp.eye(p.shape[-1], dtype=p.dtype)
    for _ in range(2):
        p = exact_matmul(p, 1.5 * eye - 0.5 * exact_matmul(p.mT, p))
    return p


@functools.partial(jax.jit, static_argnames="shifted_passes")  # traced once for all leaves of a shape
def orthonormalize(y: Float[Array, "*b m r"], shifted_passes: int = 1) -> Float[Array, "*b m r"]:
    """The `Q` of `Y = Q R`, `R` with positive diagonal, by shifted Cholesky-QR.

        Y ← Y L⁻ᵀ,   L Lᵀ = YᵀY (+ shift)

    Only `r × r` matrices are factorized, so the columns may stay sharded. A shifted pass lowers the
    condition of `Y` by up to 1e3, and a second one by 1e3/√r. One pass is enough for a condition of 1e6,
    three for 1/eps. A clean pass, without a shift, leaves a defect of that condition squared times eps. A
    second clean pass leaves only rounding.
    """
    eye = jnp.eye(y.shape[-1], dtype=y.dtype)[(None,) * (y.ndim - 2)]

    def one_pass(y, shift):
        gram = exact_matmul(y.mT, y)
        gram = gram + shift * jnp.sum(gram * eye, axis=(-2, -1), keepdims=True) * eye
        return exact_matmul(y, inverse_factor(gram).mT), None

    # Use a loop: every leaf has one, and XLA would compile every unrolled pass of each.
    shifts = jnp.asarray([_SHIFT] * shifted_passes + [0.0] * _CLEAN_PASSES, y.dtype)
    return jax.lax.scan(one_pass, y, shifts)[0]


def regularized(
    y: Float[Array, "*b m r"], p: Float[Array, "*b m r"], floor: float = _FLOOR
) -> Float[Array, "*b m r"]:
    """`Y + δ P` with `δ = floor`, as `orthonormalize` needs it: of full rank even where `Y` is not.

    `|Y|` is about 1.
    """
    return y + floor * p


def orthonormal_or(q: Float[Array, "*b m r"], p: Float[Array, "*b m r"]) -> Float[Array, "*b m r"]:
    """`Q` where its columns are unit vectors, else `P`.

    Compares each column, because the maximum on a CPU ignores NaN: a column of NaN is no unit vector.
    """
    defects = jnp.abs(jnp.sum(q * q, axis=-2, keepdims=True) - 1)
    return jnp.where(jnp.all(defects < _LARGEST_DEFECT, axis=-1, keepdims=True), q, p)
