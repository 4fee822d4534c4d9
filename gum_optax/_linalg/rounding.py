"""Stochastic rounding: the mean of the result is the number that was rounded."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt16

from .counter_bits import counters, threefry

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
    noise_bits = noise.astype(jnp.uint32)
    bits = bits + (noise_bits << (dropped - 16) if dropped > 16 else noise_bits >> (16 - dropped))
    kept = jax.lax.bitcast_convert_type((bits >> dropped) << dropped, jnp.float32) - shift
    inside = size <= largest  # false for NaN
    return jnp.where(inside, jnp.copysign(kept, x), x).astype(dtype)


def noise_of_rows(
    leaf_key: PRNGKeyArray, first: Int[Array, ""] | int, shape: tuple[int, ...]
) -> UInt16[Array, "layers *rows n"]:
    """Uniform bits for a leaf `(layers, *rows, n)` whose layers have the indices `first`, `first + 1`, ...

    A number's counter is its row, counted from the first layer, and its column: any part of a leaf can draw
    its own bits.
    """
    first_words, second_words = threefry(jax.random.key_data(leaf_key), *counters(first, shape))
    return (first_words ^ second_words).astype(jnp.uint16)
