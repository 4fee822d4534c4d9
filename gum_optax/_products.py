"""Products of matrices, and decompositions of stacks of them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def exact_matmul(a: Float[Array, "*b i j"], b: Float[Array, "*b j k"]) -> Float[Array, "*b i k"]:
    """A float32 product that an accelerator may not shorten: Gram matrices square every rounding."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def one_by_one_on_cpu(f: Callable[[Array], Array], x: Float[Array, "*b m n"]) -> Float[Array, "*b i j"]:
    """`f(x)`, where `f` is a function of stacks that calls LAPACK; a CPU calls it for one matrix at a time.

    jaxlib 0.10.0 to 0.11 splits the stack of one LAPACK call over the threads on which XLA's kernels run,
    and waits for the parts on one of those threads. If all threads wait, none is left to work, and the
    program hangs: eight host devices share eight threads and make each call together. A stack of one matrix
    is not split, and later versions loop over the stack themselves.
    """
    *batch, m, n = x.shape
    if math.prod(batch) <= 1:
        return f(x)

    def mapped(x):
        results = jax.lax.map(f, x.reshape(-1, m, n))
        return results.reshape(*batch, *results.shape[1:])

    return jax.lax.platform_dependent(x, cpu=mapped, default=f)


def inverse_factor(gram: Float[Array, "*b r r"]) -> Float[Array, "*b r r"]:
    """`L⁻¹`, where `L Lᵀ` is the Gram matrix (Cholesky)."""

    def inverse(a):
        eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
        factor = jax.lax.linalg.cholesky(a, symmetrize_input=False)
        return jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)

    return one_by_one_on_cpu(inverse, gram)
