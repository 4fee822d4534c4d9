"""Norms and products in float32: they neither overflow nor underflow between 1e-30 and 1e30."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._core.batches import map_sequentially
from .._core.xla import barrier_but_on_cpu

# The largest input of a rule with second moments. Sums of larger squares could overflow float32, and an
# infinite second moment stays infinite.
LARGEST = 1e15


def safe_reciprocal(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 / x` of non-negative numbers, and zero for zero.

    Subnormal numbers also give zero, because their reciprocals would overflow.
    """
    normal = x >= jnp.finfo(x.dtype).tiny
    return jnp.where(normal, 1 / jnp.where(normal, x, 1), 0)


def _over_largest(
    x: Float[Array, "*b m n"], axis: int | tuple[int, ...]
) -> tuple[Float[Array, "..."], Float[Array, "*b m n"]]:
    """The largest entry over `axis`, and `x` over it, so that squares stay in range; both in float32."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    return largest, x / jnp.where(largest > 0, largest, 1)


def norm(x: Float[Array, "*b m n"], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """The ℓ2-norm over `axis` in float32, with `axis` kept at size 1."""
    largest, scaled = _over_largest(x, axis)
    return largest * jnp.sqrt(jnp.sum(scaled * scaled, axis=axis, keepdims=True))


def frobenius(x: Float[Array, "*b m n"]) -> Float[Array, "*b 1 1"]:
    """`|x|_F` in float32."""
    return norm(x, (-2, -1))


def rms(x: Float[Array, "*b m n"]) -> Float[Array, "*b 1 1"]:
    """The root mean square of each matrix in float32; zero for a matrix without numbers."""
    if not x.size:
        return jnp.zeros((*x.shape[:-2], 1, 1), jnp.float32)
    return frobenius(x) / (x.shape[-2] * x.shape[-1]) ** 0.5


def wide_dtype(x: Any) -> Any:
    """The dtype of `x`, or float32 where that has more bits."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def is_finite(*arrays: Any) -> Bool[Array, ""]:
    """Whether all numbers are finite."""

    def zero(x):
        """A sum of zeros, or NaN. XLA would write the booleans of `isfinite(x)` to memory."""
        # Keep this sum in its own pass: fused with a later sum, it would make every step wait for that sum.
        x = barrier_but_on_cpu(x)
        total = jnp.sum(x - x)
        if jnp.iscomplexobj(x):
            total = total.real + total.imag
        return total.astype(jnp.float32)

    if len(arrays) == 1:
        return jnp.isfinite(zero(*arrays))
    # One array after the other: of a wide one, a CPU writes the zeros to memory before it sums them.
    return all_true(map(jnp.isfinite, map_sequentially(zero, [jnp.asarray(x) for x in arrays])))


def all_true(flags: Iterable[Bool[Array, ""]]) -> Bool[Array, ""]:
    """Whether all flags are true; computed once, however many numbers wait for it.

    It is a dot product, which XLA fuses into nothing: a chain of conjunctions would be part of each kernel
    that reads the result (`findings/xla_cpu_repeated_conjunction.sh`).
    """
    false = jnp.stack([jnp.asarray(False), *(~flag for flag in flags)]).astype(jnp.float32)
    return jnp.dot(false, false) == 0


def exact_matmul(a: Float[Array, "*b i j"], b: Float[Array, "*b j k"]) -> Float[Array, "*b i k"]:
    """A product in full float32 on every accelerator, because Gram matrices square every rounding error."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def to_unit_norm(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """`x / |x|_F` in float32, zero for zero."""
    _, x = _over_largest(x, (-2, -1))
    length = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    return x / jnp.where(length > 0, length, 1)
