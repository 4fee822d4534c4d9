"""The draw: which blocks of a group run at full rank in a period."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

# JAX's counter-based generator: the same numbers on every platform and in every process.
_IMPLEMENTATION = "threefry2x32"


def key_data(key: Any) -> UInt32[Array, "2"]:
    """Raw threefry key data from an integer seed, a typed JAX key or a raw `uint32[2]` key.

    Raises:
      TypeError: `key` is none of these, or a typed key of another generator.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if str(jax.random.key_impl(key)) not in (_IMPLEMENTATION, "fry"):
            raise TypeError(f"key must be a threefry2x32 key, got {key!r}; use jax.random.key(seed).")
        if key.ndim:
            raise TypeError(f"key must be one key, got shape {key.shape}; vmap over several.")
        return jax.random.key_data(key)
    if (
        not isinstance(key, bool)
        and jnp.shape(key) == ()
        and jnp.issubdtype(jnp.result_type(key), jnp.integer)
    ):
        return jax.random.key_data(jax.random.key(key, impl=_IMPLEMENTATION))
    if jnp.shape(key) == (2,) and jnp.result_type(key) == jnp.uint32:
        return jnp.asarray(key)
    raise TypeError(f"key must be an integer seed or a JAX key such as jax.random.key(0), got {key!r}.")


def stream(key: UInt32[Array, "2"], period: Int[Array, ""], place: int) -> PRNGKeyArray:
    """The key of one place (a leaf or a group) in one period."""
    typed = jax.random.wrap_key_data(key, impl=_IMPLEMENTATION)
    return jax.random.fold_in(jax.random.fold_in(typed, period), place)


def draw(key: UInt32[Array, "2"], period: Int[Array, ""], group: str, blocks: int, k: int) -> Int[Array, "k"]:
    """`k` of `blocks` indices without replacement, each block with probability exactly `k / blocks`.

    A pure function of its arguments: every process draws the same, and so does a resumed run.
    `group` names the draw; its checksum is stable where Python's `hash` is not.
    """
    place = zlib.crc32(group.encode())
    return jax.random.permutation(stream(key, period, place), blocks)[:k].astype(jnp.int32)
