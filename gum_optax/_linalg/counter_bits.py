"""Random numbers that are a function of a key and of their place, which XLA fuses into what reads them."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

# Of threefry2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA

Words = tuple[UInt32[Array, "..."], UInt32[Array, "..."]]


def threefry(key: UInt32[Array, "2"], high: UInt32[Array, "..."], low: UInt32[Array, "..."]) -> Words:
    """Two random words for each counter `(high, low)`: those of threefry with raw key data.

    On a CPU, `jax.random.bits` is a loop that writes every round to memory: 16 bytes for each number, and
    eight times as long (jax 0.10.2).
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
    return a, b


def counters(first: Int[Array, ""] | int, shape: tuple[int, ...]) -> Words:
    """The counters of a leaf `(layers, *rows, n)` whose layers have the indices `first`, `first + 1`, ...

    A number's counter is its row, counted from layer 0, and its column: any part of a leaf can draw its own
    numbers.
    """
    *rows, n = shape
    row = jnp.arange(math.prod(rows), dtype=jnp.uint32).reshape(*rows, 1)
    before = jnp.asarray(first, jnp.uint32) * math.prod(rows[1:])
    return before + row, jnp.arange(n, dtype=jnp.uint32)


def normal_by_place(
    key: PRNGKeyArray, first: Int[Array, ""] | int, shape: tuple[int, ...]
) -> Float[Array, "layers *rows n"]:
    """Standard normal numbers for a leaf whose layers have the indices `first`, `first + 1`, ..."""
    words, _ = threefry(jax.random.key_data(key), *counters(first, shape))
    # As `jax.random.normal`: 23 bits make a number in [1, 2), and from it one in (-1, 1).
    unit = jax.lax.bitcast_convert_type((words >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1
    symmetric = jnp.maximum(2 * unit - 1, jnp.nextafter(jnp.float32(-1), jnp.float32(0)))
    return jnp.sqrt(jnp.float32(2)) * jax.lax.erf_inv(symmetric)
