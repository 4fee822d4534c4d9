"""Norms that neither overflow nor underflow between 1e-30 and 1e30."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def inverse(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 / x` of non-negative numbers, and zero for zero: what is zero stays zero."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def frobenius(x: Float[Array, "*b m n"]) -> Float[Array, "*b 1 1"]:
    """`|x|_F` in float32; the largest entry is divided out before squaring."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    scaled = x / jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.sum(scaled * scaled, axis=(-2, -1), keepdims=True))
