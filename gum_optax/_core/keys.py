"""Keys and draws, equal in every process and on every platform."""

import dataclasses
import numbers
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, UInt32

# JAX's counter-based generator gives the same numbers on every platform and in every process.
_IMPLEMENTATION = "threefry2x32"
# A number that no user is likely to fold in.
_OWN = zlib.crc32(b"gum_optax")
_REMEDY = (
    "its draws are the same on every platform. Whatever jax_default_prng_impl is, pass an integer seed,"
    f" or jax.random.key(seed, impl={_IMPLEMENTATION!r})."
)


def _is_typed(key: Any) -> bool:
    return isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _is_seed(key: Any) -> bool:
    if isinstance(key, jax.Array | np.ndarray):
        return key.shape == () and jnp.issubdtype(key.dtype, jnp.integer)
    # The range of a 64-bit seed of `jax.random.key`.
    return isinstance(key, numbers.Integral) and not isinstance(key, bool) and abs(int(key)) < 2**63


def check_key(key: Any) -> None:
    """Check for an integer seed, a typed JAX key or a raw `uint32[2]` key, without any computation.

    Users may construct an optimizer before `jax.distributed.initialize`, which must precede any computation.

    Raises:
      TypeError: `key` is none of these, or a typed key of another generator.
    """
    if _is_typed(key):
        implementation = str(jax.random.key_impl(key))
        if implementation not in (_IMPLEMENTATION, "fry"):
            raise TypeError(f"key must be a threefry2x32 key, got one of {implementation}; {_REMEDY}")
        if key.shape:
            raise TypeError(f"key must be one key, got shape {key.shape}; vmap over several.")
    elif not _is_seed(key) and not (hasattr(key, "dtype") and key.dtype == jnp.uint32 and key.shape == (2,)):
        if hasattr(key, "dtype") and key.dtype == jnp.uint32 and key.shape == (4,):
            raise TypeError(f"key must be a threefry2x32 key, got {key!r}, a raw rbg key; {_REMEDY}")
        raise TypeError(f"key must be an integer seed or a JAX key such as jax.random.key(0), got {key!r}.")


def check_key_and_step(key: Any, step: Any) -> Int[Array, ""]:
    """Check a key, and the number of a step, which may be traced; returns the number.

    Raises:
      TypeError: `key` is no threefry key or seed, or `step` is no integer.
    """
    check_key(key)
    if not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise TypeError(f"step must be an integer, the number of the step; got {step!r}.")
    return jnp.asarray(step, jnp.int32)


def key_data(key: Any) -> UInt32[Array, "2"]:
    """Derive the library's own raw threefry key data from a key that `check_key` accepts.

    The library does not draw from the user's key itself. `jax.random.split(key, n)[i]` equals
    `jax.random.fold_in(key, i)`, so a model initialized from the same key would have the same streams, and
    `key=0` is a common seed. The state stores the derived key, so that an older state continues its draws.
    """
    if _is_seed(key):
        key = jax.random.key(key, impl=_IMPLEMENTATION)
    elif not _is_typed(key):
        key = typed(jnp.asarray(key))
    return jax.random.key_data(jax.random.fold_in(key, _OWN))


def typed(data: UInt32[Array, "*keys 2"]) -> Key[Array, "*keys"]:
    """Typed keys from raw key data."""
    return jax.random.wrap_key_data(data, impl=_IMPLEMENTATION)


def stream(key: UInt32[Array, "2"], period: Int[Array, ""], number: int | Int[Array, ""]) -> PRNGKeyArray:
    """The key of one leaf, by its index, or of one group, by its checksum, in one period."""
    return jax.random.fold_in(jax.random.fold_in(typed(key), period), number)


def streams(
    key: UInt32[Array, "2"], period: Int[Array, ""], numbers: Int[Array, "count"]
) -> Key[Array, "count"]:
    """`stream(key, period, number)` for each number."""
    return jax.vmap(stream, in_axes=(None, None, 0))(key, period, numbers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowKey:
    """The key of a draw for one row of a stack: what the stack would draw there."""

    key: PRNGKeyArray
    row: Int[Array, ""]
    rows: int = dataclasses.field(metadata={"static": True})

    def own(self) -> PRNGKeyArray:
        """A key that no other row has, for functions that know nothing of rows."""
        return jax.random.fold_in(self.key, self.row)


def of_leaf(key: PRNGKeyArray | RowKey) -> PRNGKeyArray:
    """The key of a draw that all rows of a leaf share."""
    return key.key if isinstance(key, RowKey) else key


def normal(key: PRNGKeyArray | RowKey, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """`jax.random.normal` in float32."""
    if not isinstance(key, RowKey):
        return jax.random.normal(key, shape, jnp.float32)
    whole = jax.random.normal(key.key, (key.rows, *shape[1:]), jnp.float32)
    return jax.lax.dynamic_slice_in_dim(whole, key.row, 1)


def some(keys: Key[Array, "count"], chosen: Sequence[int]) -> Key[Array, "chosen"]:
    """`keys[chosen]`, which `jax_debug_key_reuse` would take for a use of all of them."""
    if list(chosen) == list(range(len(keys))):
        return keys
    return typed(jax.random.key_data(keys)[jnp.asarray(chosen, jnp.int32)])


def draw(key: UInt32[Array, "2"], period: Int[Array, ""], group: str, blocks: int, k: int) -> Int[Array, "k"]:
    """`k` of `blocks` indices without replacement, each block with probability exactly `k / blocks`.

    The draw is a pure function of the arguments: every process draws the same blocks, and so does a resumed
    run. `group` names the draw. Its checksum is the same in every process; Python's `hash` is not.

    Examples:
      >>> key = jax.random.key_data(jax.random.key(0))
      >>> draws = [gum_optax.draw(key, jnp.int32(i), "64x256", blocks=12, k=3).tolist() for i in (0, 0, 1)]
      >>> len(set(draws[0])), draws[0] == draws[1], draws[0] == draws[2]
      (3, True, False)
    """
    number = zlib.crc32(group.encode())
    return jax.random.permutation(stream(key, period, number), blocks)[:k].astype(jnp.int32)
