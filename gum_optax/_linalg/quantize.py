"""Arrays in eight bits: a code for each number, and a scale for each block of numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt16

from .numerics import safe_reciprocal
from .rounding import round_by

# Numbers that share a scale: a float32 scale for 128 codes is 3 % of them. Blocks stay within a row, because
# a mesh may cut a leaf. (Dettmers et al., arXiv 2110.02861, and rollfast 1.3.0: 2048 of a flattened leaf.)
BLOCK = 128


class Code(NamedTuple):
    """How a number between -1 and 1 becomes eight bits."""

    dtype: Any
    # From 16 uniform bits and a number to the codes of one of its two neighbours.
    encode: Callable[[UInt16[Array, "*shape"], Float[Array, "*shape"]], Array]
    decode: Callable[[Array], Float[Array, "*shape"]]


_LARGEST = 127


def _to_integers(noise: UInt16[Array, "*shape"], y: Float[Array, "*shape"]) -> Array:
    return jnp.floor(_LARGEST * y + noise.astype(jnp.float32) / 2**16).astype(jnp.int8)


# Steps of equal size, for a momentum that is orthogonalized: what counts is an error beside the largest
# entries. (Gupta et al., arXiv 2509.23106, find linear codes enough for Muon.)
LINEAR = Code(jnp.int8, _to_integers, lambda codes: codes.astype(jnp.float32) / _LARGEST)

_FLOAT8 = jnp.float8_e4m3fn
_FLOAT8_LARGEST = float(jnp.finfo(_FLOAT8).max)

# A sign, four bits of exponent and three of mantissa, for the mean of Adam: a small number may stand beside a
# large one, and is divided by a small one.
SIGNED_FLOAT = Code(
    _FLOAT8,
    lambda noise, y: round_by(noise, _FLOAT8_LARGEST * y, _FLOAT8),
    lambda codes: codes.astype(jnp.float32) / _FLOAT8_LARGEST,
)

_DROPPED = 20  # of the 23 bits of a mantissa
_ONE = 0x3F800000 >> _DROPPED  # the first bits of 1.0, which get the code 255


def _to_first_bits(noise: UInt16[Array, "*shape"], y: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    bits = jax.lax.bitcast_convert_type(y, jnp.uint32) + (noise.astype(jnp.uint32) << (_DROPPED - 16))
    return jnp.clip((bits >> _DROPPED).astype(jnp.int32) - (_ONE - 255), 0, 255).astype(jnp.uint8)


def _from_first_bits(codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    bits = (codes.astype(jnp.uint32) + (_ONE - 255)) << _DROPPED
    return jnp.where(codes == 0, 0, jax.lax.bitcast_convert_type(bits, jnp.float32))


# Five bits of exponent and three of mantissa, for the squares of Adam, which are never negative: numbers down
# to 2^-31 of the largest in their block.
SQUARES = Code(jnp.uint8, _to_first_bits, _from_first_bits)


def scales_shape(shape: tuple[int, ...], axis: int = -1) -> tuple[int, ...]:
    """The shape of the scales of an array."""
    blocks = list(shape)
    blocks[axis] = -(-shape[axis] // BLOCK)
    return tuple(blocks)


def quantize(
    x: Float[Array, "*shape"],
    noise: UInt16[Array, "*shape"] | None = None,
    code: Code = LINEAR,
    axis: int = -1,
) -> tuple[Array, Float[Array, "*blocks"]]:
    """Codes and scales of `x`. With noise, the mean of the result is `x`; without, rounding is to nearest.

        s = max |x| over each block,   code: of one of the two neighbours of x / s

    Args:
      x: float32 numbers.
      noise: uniform bits, 16 for each number, or `None`.
      code: `LINEAR`, `SIGNED_FLOAT`, or `SQUARES` for numbers of at least 0.
      axis: the axis along which 128 numbers share a scale.

    Returns:
      Codes with the shape of `x`, and scales of `scales_shape`. Zero, and a block of subnormal numbers, give
      zero. The largest number of a block keeps its value to rounding.
    """
    scale = _largest(jnp.abs(x), axis)
    y = jnp.clip(x * _spread(safe_reciprocal(scale), x.shape, axis), -1, 1)
    noise = jnp.full(x.shape, 2**15, jnp.uint16) if noise is None else noise
    return code.encode(noise, y), scale


def dequantize(
    codes: Array, scales: Float[Array, "*blocks"], code: Code = LINEAR, axis: int = -1
) -> Float[Array, "*shape"]:
    """The float32 numbers of codes and scales."""
    return code.decode(codes) * _spread(scales, codes.shape, axis)


def _largest(x: Float[Array, "*shape"], axis: int) -> Float[Array, "*blocks"]:
    """The largest number of each block of a non-negative array."""
    axis = axis % x.ndim
    size = x.shape[axis]
    blocks = -(-size // BLOCK)
    if blocks == 1:
        return jnp.max(x, axis=axis, keepdims=True)
    missing = blocks * BLOCK - size
    x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
    shape = (*x.shape[:axis], blocks, BLOCK, *x.shape[axis + 1 :])
    return jnp.max(x.reshape(shape), axis=axis + 1)


def _spread(scales: Float[Array, "*blocks"], shape: tuple[int, ...], axis: int) -> Float[Array, "*shape"]:
    """The scale of each number."""
    axis = axis % len(shape)
    if scales.shape[axis] == 1:
        return jnp.broadcast_to(scales, shape)
    return jax.lax.slice_in_dim(jnp.repeat(scales, BLOCK, axis=axis), 0, shape[axis], axis=axis)
