"""Products of matrices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def exact_matmul(a: Float[Array, "*b i j"], b: Float[Array, "*b j k"]) -> Float[Array, "*b i k"]:
    """A float32 product that an accelerator may not shorten: Gram matrices square every rounding."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
