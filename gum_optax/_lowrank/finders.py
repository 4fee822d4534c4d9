"""Subspace finders, each with its linear form if it has one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._core.keys import RowKey, normal, of_leaf
from .._core.measurements import MeanOf
from .._core.xla import one_by_one_on_cpu, repeat, rolled_but_on_tpu
from .._linalg.numerics import exact_matmul, safe_reciprocal, to_unit_norm
from .._linalg.orthonormal import (
    orthonormal_or,
    orthonormalize,
    project,
    regularized,
)
from .._mesh.explicit import placed

# (key, gradient, previous) -> projector, its r = previous.shape[-1] columns orthonormal.
SubspaceFinder = Callable[
    [PRNGKeyArray, Float[Array, "*b m n"], Float[Array, "*b m r"]], Float[Array, "*b m r"]
]

# A finder for all leaves at once, which reads the gradients by means of linear functions only:
# (mean_of, keys, previous, ...) -> projectors; keys, previous and projectors are lists.
LinearForm = Callable[..., Any]


def with_linear_form(form: LinearForm) -> Callable[[Any], Any]:
    """Attaches a linear form to a finder, which then never needs the gradient itself."""

    def mark(find):
        find.linear_form = form
        return find

    return mark


def linear_form(find: SubspaceFinder) -> functools.partial[Any]:
    """The linear form of a finder, which may be a `functools.partial`.

    The form of a finder without one takes the mean of the gradient itself.
    """
    bound = functools.partial(find)  # its `func` is no partial, even if `find` is

    def of_the_whole(mean_of, keys, previous, **keywords):
        # A finder that draws knows nothing of rows: a row has a key of its own.
        own = [key.own() if isinstance(key, RowKey) else key for key in keys]
        return [
            bound.func(*leaf, **keywords) for leaf in zip(own, mean_of(lambda g: g), previous, strict=True)
        ]

    form = getattr(bound.func, "linear_form", of_the_whole)
    return functools.partial(form, **bound.keywords)


# Power steps by default (Halko et al., arXiv 0909.4061, section 4.5: one or two).
ITERATIONS = 2
# `δ` of a sketch. It does not bound the condition, because `G S` may cancel `δ P`. Of gradients of half the
# rank, at `r = m - 1`, one in a thousand has a condition of 100/δ (measured), which the passes still
# orthonormalize. If a column is no unit vector afterwards, the previous subspace is the start.
_FLOOR_OF_A_SKETCH = 1e-2


def svd_subspace(
    key: PRNGKeyArray, gradient: Float[Array, "*b m n"], previous: Float[Array, "*b m r"]
) -> Float[Array, "*b m r"]:
    """The top `r` left singular vectors of the gradient: `P = U[:, :r]`, `G = U Σ Vᵀ`.

    It is exact and slow: its cost grows with `m² n`, whatever the rank.
    (GaLore, arXiv 2403.03507, Algorithm 2; GUM, arXiv 2510.17802, Algorithm 2.)

    Examples:
      >>> gradient = jnp.diag(jnp.array([1.0, 2.0, 3.0, 4.0]))
      >>> p = gum_optax.svd_subspace(jax.random.key(0), gradient, jnp.zeros((4, 2)))
      >>> jnp.abs(p).tolist()
      [[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """
    del key
    # Columns beyond `min(m, n)` can only come from the null space.
    complete = previous.shape[-1] > gradient.shape[-1]

    def top(g):
        return jnp.linalg.svd(g.astype(jnp.float32), full_matrices=complete)[0][..., : previous.shape[-1]]

    return one_by_one_on_cpu(top, gradient)


def _of(gradient: Any, f: Callable[..., Any], *operands: Any) -> Any:
    """The `mean_of` of a single gradient."""
    return f(gradient, *operands)


def power_steps(mean_of: MeanOf, keys: Any, p: Any, iterations: Any = ITERATIONS) -> Any:
    """`subspace_iteration` of all leaves, which share their means. `iterations` may be traced."""
    del keys

    def step(p, _):
        return jax.tree.map(_replaced, p, _power_step(mean_of, p))

    # In float32, whatever the gradient and the state are kept in.
    p = jax.tree.map(lambda p: p.astype(jnp.float32), p)
    if isinstance(iterations, jax.Array):
        return jax.lax.fori_loop(0, iterations, lambda i, p: step(p, i), p)

    def unrolled(p):
        for i in range(iterations):
            p = step(p, i)
        return p

    return rolled_but_on_tpu(lambda p: repeat(step, p, np.arange(iterations)), unrolled, p)


@with_linear_form(power_steps)
def subspace_iteration(
    key: PRNGKeyArray,
    gradient: Float[Array, "*b m n"],
    previous: Float[Array, "*b m r"],
    iterations: int = ITERATIONS,
) -> Float[Array, "*b m r"]:
    """Warm-started power steps from the previous subspace.

        repeat:   P ← orthonormalize(G GᵀP / |G GᵀP| + δ P),   δ = 1e-5

    Two products of the projection's own size and `r × r` factorizations in place of an SVD. A zero
    gradient returns the previous subspace.

    Args:
      key: unused.
      gradient: `(*, m, n)`.
      previous: `(*, m, r)`, orthonormal columns, the start.
      iterations: power steps. One step follows a slowly moving subspace; a random start takes two or three.

    Examples:
      >>> gradient = jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))
      >>> p = gum_optax.subspace_iteration(jax.random.key(0), gradient, jnp.full((4, 1), 0.5), iterations=1)
      >>> print(np.asarray(p / p[0]).ravel().round(2))  # the squares of 4, 3, 2, 1
      [1.   0.56 0.25 0.06]
    """
    return power_steps(functools.partial(_of, gradient), key, previous, iterations)


@jax.jit  # traced once for all leaves of a shape
def _replaced(p: Float[Array, "*b m r"], y: Float[Array, "*b m r"]) -> Float[Array, "*b m r"]:
    """The orthonormal columns of `Y / |Y| + δ P`; `δ` is the default `floor` of `regularized`."""
    y = y.astype(p.dtype)
    squares = jnp.sum(y * y, axis=(-2, -1), keepdims=True)
    return orthonormalize(regularized(y * safe_reciprocal(jnp.sqrt(squares)), p))


def _power_step(mean_of: MeanOf, p: Any) -> Any:
    """`G GᵀP` up to a positive scale, of norm at least `1/√r`; zero where `G GᵀP` is zero."""
    coordinates = mean_of(lambda g, p: jax.tree.map(project, p, g), p)
    # The scale is divided out of the small factor, so that `G` is read twice and never copied.
    by = jax.tree.map(
        lambda c: safe_reciprocal(jnp.max(jnp.abs(c), axis=(-2, -1), keepdims=True)), coordinates
    )
    small = jax.tree.map(jnp.multiply, coordinates, by)
    y = mean_of(lambda g, c: jax.tree.map(lambda g, c: g @ c.mT, g, c), small)
    # `Pᵀ Y` has a trace of at least one, so that nothing underflows.
    return jax.tree.map(jnp.multiply, y, by)


def _from_sketch(mean_of: MeanOf, keys: Any, p: Any, iterations: int = 1) -> Any:
    """`sketched_subspace` of all leaves, which share their means."""

    def sketch(p, key, g):
        s = count_sketch(of_leaf(key), g.shape[-1], p.shape[-1])
        # A sketch for each block: for one that all blocks share, a CPU would copy a leaf that is stored
        # transposed.
        return g @ jnp.broadcast_to(s, (*g.shape[:-2], *s.shape))

    def start(p, y):
        return orthonormal_or(orthonormalize(regularized(to_unit_norm(y), p, _FLOOR_OF_A_SKETCH)), p)

    y = mean_of(lambda g: jax.tree.map(sketch, p, keys, g))
    return power_steps(mean_of, keys, jax.tree.map(start, p, y), iterations)


@with_linear_form(_from_sketch)
def sketched_subspace(
    key: PRNGKeyArray,
    gradient: Float[Array, "*b m n"],
    previous: Float[Array, "*b m r"],
    iterations: int = 1,
) -> Float[Array, "*b m r"]:
    """Power steps from a sketch of the gradient: nearly the top `r` left singular vectors, from no start.

        S: n × r, each row has one entry, a random sign, in a random column
        P ← orthonormalize(G S / |G S| + δ P),  δ = 1e-2,   then `iterations` steps of `subspace_iteration`

    A sketch costs half a power step, and depends on the gradient where a random subspace does not. A zero
    gradient returns the previous subspace.

    Args:
      key: of `S`, the same for all blocks of a leaf.
      gradient: `(*, m, n)`.
      previous: `(*, m, r)`, orthonormal columns, which fill up what the gradient leaves open.
      iterations: power steps after the sketch.

    Examples:
      >>> gradient = jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))
      >>> p = gum_optax.sketched_subspace(jax.random.key(0), gradient, jnp.eye(4, 2), iterations=8)
      >>> round(float(jnp.sum((p.T @ gradient) ** 2)), 2)  # 4² + 3²
      25.0

    References:
      Halko et al., arXiv 0909.4061, Algorithm 4.4; the sketch of Clarkson and Woodruff, arXiv 1207.6365.
    """
    return _from_sketch(functools.partial(_of, gradient), key, previous, iterations)


def count_sketch(key: PRNGKeyArray, n: int, r: int) -> Float[Array, "n r"]:
    """`S` with `E[S Sᵀ] = I`: adds each column of a matrix to one of `r` columns, or subtracts it."""
    # One draw decides the column and the sign. It is the same with 64 bits as without.
    drawn = jax.random.randint(key, (n, 1), 0, 2 * r, jnp.int32)
    columns = jnp.arange(r)[None]
    return (drawn == columns).astype(jnp.float32) - (drawn == r + columns).astype(jnp.float32)


def _from_random(mean_of: MeanOf, keys: Any, p: Any, oversampling: int = 8, power_iterations: int = 2) -> Any:
    """`randomized_svd` of all leaves, which share their means."""

    def start(p, key):
        m, r = p.shape[-2:]
        return orthonormalize(normal(key, (*p.shape[:-1], min(m, r + oversampling))))

    def leading(p, q, coordinates):
        b = to_unit_norm(coordinates)
        v = one_by_one_on_cpu(lambda a: jnp.linalg.eigh(a)[1], exact_matmul(b, b.mT))  # ascending
        return exact_matmul(q, v[..., ::-1][..., : p.shape[-1]])

    q = power_steps(mean_of, keys, jax.tree.map(start, p, keys), power_iterations)
    return jax.tree.map(leading, p, q, mean_of(lambda g, q: jax.tree.map(project, q, g), q))


@with_linear_form(_from_random)
def randomized_svd(
    key: PRNGKeyArray | RowKey,
    gradient: Float[Array, "*b m n"],
    previous: Float[Array, "*b m r"],
    oversampling: int = 8,
    power_iterations: int = 2,
) -> Float[Array, "*b m r"]:
    """The top `r` left singular vectors, from a random subspace that is a little larger.

        Q uniform, r + oversampling columns;   repeat:   Q ← orthonormalize(G GᵀQ / |G GᵀQ| + δ Q),   δ = 1e-5
        P = Q V[:, :r],   V the eigenvectors of (QᵀG)(QᵀG)ᵀ

    Args:
      key: of the random start.
      gradient: `(*, m, n)`.
      previous: `(*, m, r)`; only its shape is used.
      oversampling: extra columns; 5 to 10 in Halko et al., arXiv 0909.4061, section 4.2.
      power_iterations: steps with `G Gᵀ`; 1 to 2 there (section 4.5).

    Examples:
      >>> gradient = jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))
      >>> p = gum_optax.randomized_svd(jax.random.key(0), gradient, jnp.zeros((4, 2)))
      >>> round(float(jnp.sum((p.T @ gradient) ** 2)), 2)  # 4² + 3²
      25.0
    """
    return _from_random(functools.partial(_of, gradient), key, previous, oversampling, power_iterations)


def _random(mean_of: MeanOf, keys: Any, p: Any) -> Any:
    del mean_of
    return [random_subspace(key, projector, projector) for key, projector in zip(keys, p, strict=True)]


@with_linear_form(_random)
def random_subspace(
    key: PRNGKeyArray | RowKey, gradient: Float[Array, "*b m n"], previous: Float[Array, "*b m r"]
) -> Float[Array, "*b m r"]:
    """A subspace drawn uniformly (Haar), whatever the gradient: the `P` of a Gaussian's `P R`.

    `E[P Pᵀ] = (r/m) I`, so a projection on it is unbiased up to that factor.
    (GoLore, arXiv 2410.11289; Flora, arXiv 2402.03293.)

    Examples:
      >>> p = gum_optax.random_subspace(jax.random.key(0), jnp.ones((4, 8)), jnp.zeros((4, 2)))
      >>> bool(jnp.allclose(p.T @ p, jnp.eye(2), atol=1e-5))
      True
    """
    del gradient
    return orthonormalize(normal(key, previous.shape))


def first_subspace(key: PRNGKeyArray, g: Float[Array, "*b m n"], rank: int) -> Float[Array, "*b m r"]:
    """A random subspace to start from, sharded as the rows of `g`."""
    return placed(random_subspace(key, g, jnp.zeros((*g.shape[:-1], rank))), g, -2, rank)
