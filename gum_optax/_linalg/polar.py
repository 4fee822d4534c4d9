"""The polar factor of a matrix, exactly."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.xla import one_by_one_on_cpu
from .newton_schulz import POLAR_EXPRESS, POLAR_EXPRESS_MINIMAX, Coefficients, newton_schulz
from .numerics import to_unit_norm

# An SVD in float32 gives a null space singular values of up to this many eps σ₁. Measured: below 3 up to
# 512 × 2048.
_SVD_ROUNDINGS = 8.0

# A table for singular values down to 1e-5. Three more steps of the first polynomial, scaled so that [0, 1]
# stays in [0, 1], raise the singular values by 4.16 each, up to where the minimax table begins. One more
# Newton-Schulz step finishes. Measured at condition 1e5, 128 × 512: the result is 5e-4 from the exact factor,
# an SVD in float32 is 8e-4 from it, and singular values of a null space stay below 0.025. A fourth step would
# raise those to 0.1.
_FIRST_MAXIMUM = 1.9917128115777256  # of the first polynomial over [0, 1]
_LEAD = tuple(x / _FIRST_MAXIMUM for x in POLAR_EXPRESS_MINIMAX[0])
_EXACT: Coefficients = ((_LEAD[0], _LEAD[1], _LEAD[2]),) * 3 + (*POLAR_EXPRESS, POLAR_EXPRESS[-1])


def polar(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """The polar factor, exactly: `U Vᵀ` over the singular values that are not rounding noise.

        x = U Σ Vᵀ,   result = Σᵢ uᵢ vᵢᵀ [σᵢ > 8 ε σ₁]

    Directions in the null space become zero, and so does a zero matrix. (SUMO, arXiv 2505.24749, asks for
    an exact factor, for the error of Newton-Schulz grows with the condition number. The usual cut at
    `max(m, n) ε` would be at condition 2e3 for n = 4096.)

    Args:
      x: matrices in the last two axes, of any floating dtype.

    Returns:
      Matrices of the shape and dtype of `x`, computed in float32 by an SVD.

    Examples:
      >>> y = gum_optax.polar(jnp.diag(jnp.array([3.0, 1e-3, 0.0])))
      >>> print(np.linalg.svd(y, compute_uv=False).round(3))
      [1. 1. 0.]
    """

    def factor(x):
        unit = to_unit_norm(x)  # keeps the singular values of inputs from 1e-30 to 1e30 in range
        u, s, vt = jnp.linalg.svd(unit, full_matrices=False)
        noise = _SVD_ROUNDINGS * jnp.finfo(jnp.float32).eps * s[..., :1]
        kept = jnp.where((s > noise)[..., None, :], u, 0)
        return (kept @ vt).astype(x.dtype)

    return one_by_one_on_cpu(factor, x)


def polar_by_products(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """The polar factor at float32 accuracy up to condition 1e5, by matrix products alone: `polar` for
    accelerators.

    It is Newton-Schulz with twelve steps at full float32 precision. The usual method without an SVD, an
    eigendecomposition of the Gram matrix, squares the condition and fails from 1e4 on.

    Args:
      x: matrices in the last two axes, of any floating dtype; null spaces become zero within 0.025.

    Examples:
      >>> y = gum_optax.polar_by_products(jnp.diag(jnp.array([3.0, 1e-3, 0.0])))
      >>> print(np.linalg.svd(y, compute_uv=False).round(3))
      [1. 1. 0.]
    """
    with jax.default_matmul_precision("highest"):
        return newton_schulz(x, _EXACT)
