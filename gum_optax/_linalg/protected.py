"""Protected subspaces of a matrix: taking a step off them, finding them, extending them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.xla import one_by_one_on_cpu
from .numerics import exact_matmul
from .orthonormal import outside

# Directions with less of the squared norm than this are rounding of float32.
_LEAST_SHARE = 1e-10


def off_both_sides(
    left: Float[Array, "*b m k"], right: Float[Array, "*b n l"], x: Float[Array, "*b m n"]
) -> Float[Array, "*b m n"]:
    """`(I - U Uᵀ) X (I - V Vᵀ)` in float32, for orthonormal columns or columns of zeros."""
    x = x.astype(jnp.float32)
    x = x - exact_matmul(left, exact_matmul(left.mT, x))
    return x - exact_matmul(exact_matmul(x, right), right.mT)


def top_singular_vectors(
    w: Float[Array, "*b m n"], k: int
) -> tuple[Float[Array, "*b m k"], Float[Array, "*b n k"]]:
    """The `k` first left and right singular vectors."""

    def both(w):
        u, _, vt = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
        return jnp.concatenate([u[..., :k], vt[..., :k, :].mT], axis=-2)

    found = one_by_one_on_cpu(both, w)
    return found[..., : w.shape[-2], :], found[..., w.shape[-2] :, :]


def extend_basis(
    basis: Float[Array, "*b m s"], moment: Float[Array, "*b m n"], energy: Float[Array, ""] | float
) -> Float[Array, "*b m s"]:
    """Add to a basis the directions in which a moment is large.

        M̂ = M - S SᵀM = U Σ Vᵀ,   S ← [S, U[:, :k]]   with the least k for which
        |S SᵀM|² + σ₁² + ... + σₖ² >= ε |M|²

    Args:
      basis: `S`, orthonormal columns and after them columns of zeros, which are free. If there are too few,
        as many directions are added as fit, the largest first.
      moment: `M`, such as Adam's first moment at the end of a task.
      energy: `ε` in `[0, 1)`.

    Returns:
      The extended basis. A moment that is not finite adds nothing.

    Examples:
      >>> basis = jnp.eye(4, 1) * jnp.array([1.0, 0.0])  # one direction, and a free column
      >>> moment = jnp.diag(jnp.array([1.0, 2.0, 0.1, 0.0]))
      >>> jnp.abs(gum_optax.extend_basis(basis, moment, energy=0.9)).round(3).tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]

    References:
      Wang et al., GORP, arXiv 2507.02503, as summarized; the sum that counts the old directions is that of
      GPM (Saha et al., arXiv 2103.09762), its model.
    """
    m = moment.astype(jnp.float32)
    largest = jnp.max(jnp.abs(m), axis=(-2, -1), keepdims=True)
    m = m / jnp.where(largest > 0, largest, 1)
    rest = outside(basis, m)

    def scaled(rest):
        """`U Σ`: one array, and the norms of its columns are the singular values."""
        u, sigma, _ = jnp.linalg.svd(rest, full_matrices=False)
        return u * sigma[..., None, :]

    columns = one_by_one_on_cpu(scaled, rest)
    squares = jnp.sum(columns * columns, axis=-2)
    total = jnp.sum(m * m, axis=(-2, -1))[..., None]
    before = total - jnp.sum(rest * rest, axis=(-2, -1))[..., None] + jnp.cumsum(squares, axis=-1) - squares
    is_new = (before < energy * total) & (squares > _LEAST_SHARE * total)
    unit = columns / jnp.sqrt(jnp.where(is_new, squares, 1))[..., None, :]
    new = jnp.where(is_new[..., None, :], unit, 0)
    both = jnp.concatenate([basis, new], axis=-1)
    is_free = jnp.sum(both * both, axis=-2) < 0.5
    order = jnp.argsort(is_free, axis=-1, stable=True)[..., : basis.shape[-1]]
    return jnp.take_along_axis(both, order[..., None, :], axis=-1)
