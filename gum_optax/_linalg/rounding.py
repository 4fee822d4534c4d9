"""Stochastic rounding: the mean of the result is the number that was rounded."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt16, UInt32

# The dtypes that `round_by` rounds to.
ROUNDED = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def round_by(noise: UInt16[Array, "*shape"], x: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """Round float32 `x` to one of its two neighbours in `dtype`, up if the noise says so.

        P(up) = (x - below) / (above - below)

    A number that `dtype` can represent stays as it is. NaN and infinity stay, and beyond the largest number
    of `dtype` rounding is to nearest, as in a plain conversion.

    Args:
      noise: uniform bits, 16 for each number. A bfloat16 has 16 bits less than a float32, a float16 has 13,
        and a float8_e4m3fn has 20, of which the last four count as zeros.
      x: the numbers.
      dtype: bfloat16, float16 or float8_e4m3fn.

    Returns:
      The rounded numbers in `dtype`.
    """
    x = x.astype(jnp.float32)
    limits = jnp.finfo(dtype)
    dropped = jnp.finfo(jnp.float32).nmant - limits.nmant
    size = jnp.abs(x)
    # Subnormal numbers have one spacing. With the smallest normal number added, so have these.
    smallest, largest = float(limits.smallest_normal), float(limits.max)
    shift = jnp.where(size < smallest, smallest, 0.0)
    bits = jax.lax.bitcast_convert_type(size + shift, jnp.uint32)
    # Floats of one sign are in the order of their bits: add the noise, then drop the last bits.
    wide = noise.astype(jnp.uint32)
    bits = bits + (wide << (dropped - 16) if dropped > 16 else wide >> (16 - dropped))
    kept = jax.lax.bitcast_convert_type((bits >> dropped) << dropped, jnp.float32) - shift
    inside = size <= largest  # false for NaN
    return jnp.where(inside, jnp.copysign(kept, x), x).astype(dtype)


# Of threefry2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def fused_bits(keys: UInt32[Array, "*b 2"], n: int) -> UInt16[Array, "*b n"]:
    """`jax.random.bits(key, (n,), uint16)` of each raw key, which XLA fuses into what reads it.

    On a CPU, `jax.random.bits` is a loop that writes every round to memory: 16 bytes for each number, and
    eight times as long (jax 0.10.2). These bits are those of partitionable threefry, whatever JAX's flag is.
    """
    first, second = keys[..., 0, None], keys[..., 1, None]
    schedule = (first, second, first ^ second ^ jnp.uint32(_PARITY))
    shape = (*keys.shape[:-1], n)
    a = jnp.broadcast_to(first, shape)
    b = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1) + second
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            a = a + b
            b = ((b << rotation) | (b >> (32 - rotation))) ^ a
        a = a + schedule[(i + 1) % 3]
        b = b + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return (a ^ b).astype(jnp.uint16)


def noise_of_rows(
    leaf_key: PRNGKeyArray, first: Int[Array, ""] | int, shape: tuple[int, ...]
) -> UInt16[Array, "layers *rows n"]:
    """Uniform bits for a leaf `(layers, *rows, n)` whose layers have the indices `first`, `first + 1`, ...

    Each row has a key, so that any part of a leaf can draw its own bits.
    """

    def row_key(layer, row):
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(leaf_key, layer), row))

    layers, *middle, n = shape
    rows = math.prod(middle)
    index = jnp.arange(layers * rows, dtype=jnp.int32)
    keys = jax.vmap(row_key)(first + index // max(rows, 1), index % max(rows, 1))
    return fused_bits(keys.reshape(layers, *middle, 2), n)
