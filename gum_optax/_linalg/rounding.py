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


def fused_bits(
    key: UInt32[Array, "2"], high: UInt32[Array, "..."], low: UInt32[Array, "..."]
) -> UInt16[Array, "..."]:
    """Uniform bits: those of threefry with raw key data for each counter `(high, low)`.

    XLA fuses them into what reads them. On a CPU, `jax.random.bits` is a loop that writes every round to
    memory: 16 bytes for each number, and eight times as long (jax 0.10.2).
    """
    first, second = key
    schedule = (first, second, first ^ second ^ jnp.uint32(_PARITY))
    a, b = jnp.broadcast_arrays(high + first, low + second)
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

    A number's counter is its row, counted from the first layer, and its column: any part of a leaf can draw
    its own bits.
    """
    *rows, n = shape
    row = jnp.arange(math.prod(rows), dtype=jnp.uint32).reshape(*rows, 1)
    before = jnp.asarray(first, jnp.uint32) * math.prod(rows[1:])
    return fused_bits(jax.random.key_data(leaf_key), before + row, jnp.arange(n, dtype=jnp.uint32))
