"""Norms and products in float32: they neither overflow nor underflow between 1e-30 and 1e30."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# The largest number that a rule with second moments is fed: squares of more, summed, could overflow float32,
# and an infinite second moment never comes back.
LARGEST = 1e15


def safe_reciprocal(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 / x` of non-negative numbers, and zero for zero: what is zero stays zero.

    So is what is below the normal numbers: its inverse would overflow.
    """
    normal = x >= jnp.finfo(x.dtype).tiny
    return jnp.where(normal, 1 / jnp.where(normal, x, 1), 0)


def norm(x: Float[Array, "*b m n"], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """The ℓ2-norm over `axis`, kept with size 1, in float32; the largest entry is divided out first."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scaled = x / jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.sum(scaled * scaled, axis=axis, keepdims=True))


def frobenius(x: Float[Array, "*b m n"]) -> Float[Array, "*b 1 1"]:
    """`|x|_F` in float32."""
    return norm(x, (-2, -1))


def is_finite(*arrays: Any) -> Bool[Array, ""]:
    """Whether no number is NaN or infinite."""

    def zero(x):
        """A sum of zeros, or NaN; XLA would write out the booleans of `isfinite(x)`."""
        # A pass of its own: fused with a sum that waits for more, it would make every step wait for that.
        x = jax.lax.optimization_barrier(x)
        total = jnp.sum(x - x)
        if jnp.iscomplexobj(x):
            total = total.real + total.imag
        return total.astype(jnp.float32)

    if len(arrays) == 1:
        return jnp.isfinite(zero(*arrays))
    # The product of the sums with themselves is no chain of operations that XLA would fuse, once more
    # each time, into all that asks whether the step is taken.
    sums = jnp.stack([zero(x) for x in arrays] or [0.0])
    return jnp.isfinite(jnp.dot(sums, sums))


def exact_matmul(a: Float[Array, "*b i j"], b: Float[Array, "*b j k"]) -> Float[Array, "*b i k"]:
    """A float32 product that an accelerator may not shorten: Gram matrices square every rounding."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def divided_by_norm(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """`x / |x|_F` in float32, zero to zero; dividing by the largest entry first keeps squares in range."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    return x / jnp.where(norm > 0, norm, 1)
