"""Subspace finders."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._core.measurements import MeanOf
from .._core.xla import one_by_one_on_cpu
from .._linalg.numerics import exact_matmul, frobenius, inverse
from .._linalg.orthonormal import (
    CLEAN_PASSES,
    CLEAN_PASSES_BETWEEN,
    FLOOR,
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

# The same of a sketch, which bounds nothing for sure: `G S` may cancel `δ P`. Of gradients of half the rank,
# at `r = m - 1`, one in a thousand gives a condition of 100/δ (measured), still in reach of the passes; where
# they fail, columns are no unit vectors, and the previous subspace is the start.
_FLOOR_OF_A_SKETCH = 1e-2


def svd_subspace(
    key: PRNGKeyArray, gradient: Float[Array, "*b m n"], previous: Float[Array, "*b m r"]
) -> Float[Array, "*b m r"]:
    """The top `r` left singular vectors of the gradient: `P = U[:, :r]`, `G = U Σ Vᵀ`.

    Exact, and slow: its cost grows with `m² n`, whatever the rank.
    (GaLore, arXiv 2403.03507, Algorithm 2; GUM, arXiv 2510.17802, Algorithm 2.)
    """
    del key
    # More columns than `min(m, n)` can only be completed from the null space.
    complete = previous.shape[-1] > gradient.shape[-1]

    def top(g):
        return jnp.linalg.svd(g.astype(jnp.float32), full_matrices=complete)[0][..., : previous.shape[-1]]

    return one_by_one_on_cpu(top, gradient)


def subspace_iteration(
    key: PRNGKeyArray,
    gradient: Float[Array, "*b m n"],
    previous: Float[Array, "*b m r"],
    iterations: int = 2,
) -> Float[Array, "*b m r"]:
    """Warm-started power steps from the previous subspace.

        repeat:   P ← orthonormalize(G GᵀP / |G GᵀP| + δ P)

    Two products of the projection's own size and `r × r` factorizations in place of an SVD. A zero
    gradient returns the previous subspace.

    Args:
      key: unused.
      gradient: `(*, m, n)`.
      previous: `(*, m, r)`, orthonormal columns, the start.
      iterations: power steps; one follows a slowly moving subspace, from nothing it takes two or three
        (see `sketched_subspace`).
    """
    del key
    return _iterated(lambda f: f(gradient), previous, iterations)


def _iterated(mean_of: MeanOf, p: Any, iterations: int = 2) -> Any:
    """`subspace_iteration` of a leaf, or of all that share their means."""
    # Unrolled: a loop would hold a gradient that is stored the other way round as a copy.
    for left in reversed(range(iterations)):
        p = _replaced(p, _power_step(mean_of, p), left)
    return p


def _replaced(p: Any, y: Any, left: int, floor: float = FLOOR) -> Any:
    """`orthonormalize(Y / |Y| + δ P)`, to rounding where no power steps are left."""
    clean_passes = CLEAN_PASSES_BETWEEN if left else CLEAN_PASSES

    def replaced(p, y):
        return orthonormalize(regularized(_to_norm_one(y), p, floor), clean_passes=clean_passes)

    return jax.tree.map(replaced, p, y)


def _power_step(mean_of: MeanOf, p: Any) -> Any:
    """`G GᵀP` of some scale; zero where that is zero."""
    coordinates = mean_of(lambda g: jax.tree.map(project, p, g))
    # Scales are divided out on the small side: G itself is read twice and never copied.
    small = jax.tree.map(_to_largest_one, coordinates)
    return mean_of(lambda g: jax.tree.map(lambda g, c: g @ c.mT, g, small))


def _to_largest_one(x: Float[Array, "*b r n"]) -> Float[Array, "*b r n"]:
    return x * inverse(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))


def _to_norm_one(x: Float[Array, "*b m r"]) -> Float[Array, "*b m r"]:
    return x * inverse(frobenius(x))


def sketched_subspace(
    key: PRNGKeyArray,
    gradient: Float[Array, "*b m n"],
    previous: Float[Array, "*b m r"],
    iterations: int = 1,
) -> Float[Array, "*b m r"]:
    """Power steps from a sketch of the gradient: nearly the top `r` left singular vectors, from nothing.

        S: n × r, each row has one entry, a random sign, in a random column
        P ← orthonormalize(G S / |G S| + δ P),  δ = 1e-2,   then `iterations` steps of `subspace_iteration`

    A sketch is half a power step, and knows the gradient where a random subspace does not. A zero gradient
    returns the previous subspace.

    Args:
      key: of `S`, the same for all blocks of a leaf.
      gradient: `(*, m, n)`.
      previous: `(*, m, r)`, orthonormal columns; only what the gradient does not fill is taken from it.
      iterations: power steps after the sketch.

    References:
      Halko et al., arXiv 0909.4061, Algorithm 4.4; the sketch of Clarkson and Woodruff, arXiv 1207.6365.
    """
    return _from_sketch(lambda f: f(gradient), key, previous, iterations)


def _from_sketch(mean_of: MeanOf, key: Any, p: Any, iterations: int = 1) -> Any:
    """`sketched_subspace` of a leaf, or of all that share their means."""

    def sketch(key, p, g):
        s = count_sketch(key, g.shape[-1], p.shape[-1])
        # One a block: for one that all share, a CPU copies a leaf that is stored the other way round.
        return g @ jnp.broadcast_to(s, (*g.shape[:-2], *s.shape))

    y = mean_of(lambda g: jax.tree.map(sketch, key, p, g))
    start = _replaced(p, y, iterations, _FLOOR_OF_A_SKETCH)
    return _iterated(mean_of, jax.tree.map(orthonormal_or, start, p), iterations)


def count_sketch(key: PRNGKeyArray, n: int, r: int) -> Float[Array, "n r"]:
    """`S` with `E[S Sᵀ] = I`: adds each column of a matrix to one of `r`, or takes it from that."""
    # One draw: `r` places to add at, `r` to take from. The same with 64 bits as without.
    drawn = jax.random.randint(key, (n, 1), 0, 2 * r, jnp.int32)
    places = jnp.arange(r)[None]
    return (drawn == places).astype(jnp.float32) - (drawn == r + places).astype(jnp.float32)


def randomized_svd(
    key: PRNGKeyArray,
    gradient: Float[Array, "*b m n"],
    previous: Float[Array, "*b m r"],
    oversampling: int = 8,
    power_iterations: int = 2,
) -> Float[Array, "*b m r"]:
    """The top `r` left singular vectors, found afresh from a random subspace that is a little larger.

        Q uniform, r + oversampling columns;   repeat:   Q ← orthonormalize(G GᵀQ / |G GᵀQ| + δ Q)
        P = Q V[:, :r],   V the eigenvectors of (QᵀG)(QᵀG)ᵀ

    Args:
      key: of the random start.
      gradient: `(*, m, n)`.
      previous: `(*, m, r)`; only its shape is used.
      oversampling: extra columns; 5 to 10 in Halko et al., arXiv 0909.4061, section 4.2.
      power_iterations: steps with `G Gᵀ`; 1 to 2 there (section 4.5).
    """
    m, r = previous.shape[-2:]
    columns = min(m, r + oversampling)
    q = orthonormalize(jax.random.normal(key, (*previous.shape[:-1], columns), jnp.float32))
    q = _iterated(lambda f: f(gradient), q, power_iterations)
    b = _to_norm_one(project(q, gradient))
    v = one_by_one_on_cpu(lambda a: jnp.linalg.eigh(a)[1], exact_matmul(b, b.mT))  # ascending
    return exact_matmul(q, v[..., ::-1][..., :r])


def random_subspace(
    key: PRNGKeyArray, gradient: Float[Array, "*b m n"], previous: Float[Array, "*b m r"]
) -> Float[Array, "*b m r"]:
    """A subspace drawn uniformly (Haar) whatever the gradient: `P` of a Gaussian's `P R`.

    `E[P Pᵀ] = (r/m) I`, so a projection on it is unbiased up to that factor.
    (GoLore, arXiv 2410.11289; Flora, arXiv 2402.03293.)
    """
    del gradient
    return orthonormalize(jax.random.normal(key, previous.shape, jnp.float32))


def by_means(find: SubspaceFinder) -> Callable[[list[PRNGKeyArray], MeanOf, list[Array]], list[Array]]:
    """A finder for gradients that nobody holds: `(keys, mean_of, previous) -> projectors`, an entry a leaf.

    All leaves take each mean at once.

    Raises:
      TypeError: the finder needs the gradients themselves.
    """
    bound = functools.partial(find)  # which takes a partial apart
    if bound.func is subspace_iteration:
        return lambda keys, mean_of, previous: _iterated(mean_of, previous, **bound.keywords)
    if bound.func is sketched_subspace:
        return lambda keys, mean_of, previous: _from_sketch(mean_of, keys, previous, **bound.keywords)
    if bound.func is random_subspace:
        return lambda keys, mean_of, previous: [
            random_subspace(k, p, p) for k, p in zip(keys, previous, strict=True)
        ]
    name = getattr(bound.func, "__name__", repr(bound.func))
    raise TypeError(
        f"{name} needs the whole gradient, which projected_update never forms;"
        " pass find_subspace=gum_optax.track_subspace, or another of sketches and power steps."
    )


def first_subspace(key: PRNGKeyArray, g: Float[Array, "*b m n"], rank: int) -> Float[Array, "*b m r"]:
    """A random one to start from, sharded as the rows of `g`."""
    return placed(random_subspace(key, g, jnp.zeros((*g.shape[:-1], rank))), g, -2, rank)
