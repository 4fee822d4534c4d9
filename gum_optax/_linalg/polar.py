"""The polar factor of a matrix, exactly."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.xla import one_by_one_on_cpu
from .newton_schulz import POLAR_EXPRESS, POLAR_EXPRESS_MINIMAX, Coefficients, newton_schulz
from .numerics import divided_by_norm

# The singular values that an SVD in float32 gives a null space, in units of eps σ₁; measured below 3 up
# to 512 × 2048.
_SVD_ROUNDINGS = 8.0

# For singular values down to 1e-5: three more steps of the first polynomial, scaled so that [0, 1] stays in
# [0, 1], raise them by 4.16 each to where the minimax table begins; one more Newton-Schulz step finishes.
# Measured at condition 1e5, 128 × 512: 5e-4 from the exact factor where an SVD in float32 is 8e-4 away,
# and singular values of a null space stay below 0.025. A fourth step would raise those to 0.1.
_FIRST_MAXIMUM = 1.9917128115777256  # of the first polynomial over [0, 1]
_LEAD = tuple(x / _FIRST_MAXIMUM for x in POLAR_EXPRESS_MINIMAX[0])
_EXACT: Coefficients = ((_LEAD[0], _LEAD[1], _LEAD[2]),) * 3 + (*POLAR_EXPRESS, POLAR_EXPRESS[-1])


def polar(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """The polar factor, exactly: `U Vᵀ` over the singular values that are not rounding noise.

        x = U Σ Vᵀ,   result = Σᵢ uᵢ vᵢᵀ [σᵢ > 8 ε σ₁]

    Directions in the null space go to zero, and so does a zero matrix. (SUMO, arXiv 2505.24749, needs
    it exact up to condition 1e5 and beyond: the usual cut at `max(m, n) ε` would be at 2e3 for n = 4096.)

    Args:
      x: matrices in the last two axes, of any floating dtype.

    Returns:
      Matrices of the shape and dtype of `x`, computed in float32 by an SVD.
    """

    def factor(x):
        unit = divided_by_norm(x)  # from 1e-30 to 1e30 the singular values stay in range
        u, s, vt = jnp.linalg.svd(unit, full_matrices=False)
        noise = _SVD_ROUNDINGS * jnp.finfo(jnp.float32).eps * s[..., :1]
        kept = jnp.where((s > noise)[..., None, :], u, 0)
        return (kept @ vt).astype(x.dtype)

    return one_by_one_on_cpu(factor, x)


def polar_by_products(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """The polar factor to float32 at condition 1e5, by matrix products alone: `polar` for accelerators.

    Newton-Schulz with twelve steps at full float32 precision. The Gram matrix's eigendecomposition, the
    usual way without an SVD, squares the condition and fails from 1e4 on.

    Args:
      x: matrices in the last two axes, of any floating dtype; null spaces go to zero within 0.025.
    """
    with jax.default_matmul_precision("highest"):
        return newton_schulz(x, _EXACT)
