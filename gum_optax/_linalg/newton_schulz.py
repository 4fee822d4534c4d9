"""Newton-Schulz: the polar factor of a matrix by matrix products alone."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.batches import map_in_place
from .._core.checks import check_integer
from .._core.xla import repeat
from .numerics import exact_matmul, to_unit_norm

Coefficients = Sequence[tuple[float, float, float]]
Orthogonalizer = Callable[[Float[Array, "*b m n"]], Float[Array, "*b m n"]]

JORDAN: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
"""Keller Jordan's quintic, in his five steps: singular values go to about [0.7, 1.2].

It has the steepest slope at zero that keeps them there (https://kellerjordan.github.io/posts/muon).

Examples:
  >>> y = gum_optax.newton_schulz(jnp.diag(jnp.array([1.0, 0.1, 0.01, 0.0])), gum_optax.JORDAN)
  >>> print(np.diagonal(y).round(1))
  [0.7 0.7 0.7 0. ]
"""

# The minimax quintics of Polar Express (arXiv 2505.16932, Algorithm 1 and its listing) for
# singular values in [1e-3, 1]. The last row is the Newton-Schulz step itself.
POLAR_EXPRESS_MINIMAX: Coefficients = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# The same listing leaves headroom for rounding: every step but the last divides its input by 1.01, and
# the start is X/(1.01 |X|_F). The coefficients include both factors, so every table starts from X/|X|_F.
_HEADROOM = 1.01


# Matrices of fewer entries are multiplied as one stack. Any number at which the buffers of a stack are small.
# Measured on a CPU, twelve matrices: one by one takes 1.3 times as long at 32 × 32, and 0.8 to 1.1 times from
# 128 × 128 on.
_LARGE = 2**18

# The Gram form is faster on a CPU from this ratio of width to height on. Measured: 1.1 to 1.2 times as fast
# at a ratio of 2, 1.3 to 1.8 times from 3 on.
_WIDE_ENOUGH = 2


def _stretched(row: tuple[float, float, float], factor: float) -> tuple[float, float, float]:
    """The quintic of `x / factor`."""
    a, b, c = row
    return a / factor, b / factor**3, c / factor**5


POLAR_EXPRESS: Coefficients = (
    _stretched(POLAR_EXPRESS_MINIMAX[0], _HEADROOM**2),
    *(_stretched(row, _HEADROOM) for row in POLAR_EXPRESS_MINIMAX[1:-1]),
    POLAR_EXPRESS_MINIMAX[-1],
)
"""Eight minimax quintics: singular values from 1e-3 of the largest go to 1 within 1e-5 (Polar Express).

Examples:
  >>> y = gum_optax.newton_schulz(jnp.diag(jnp.array([1.0, 0.1, 0.01, 0.0])), gum_optax.POLAR_EXPRESS)
  >>> print(np.diagonal(y).round(3))
  [1. 1. 1. 0.]
"""


# Newton-Schulz's own quintic, the steepest at zero of those that rise to 1 and are flat there; and the only
# quintic without a linear term that does.
_PROMOTION = (1.875, -1.25, 0.375)
_SUPPRESSION = (0.0, 2.5, -1.5)


def high_pass(promotions: int, steps: int = 5) -> Coefficients:
    """Coefficients that keep the large singular values and drop the small ones, for noisy gradients (Pion).

        σ ← (15 σ - 10 σ³ + 3 σ⁵)/8   `promotions` times,   then   σ ← (5 σ³ - 3 σ⁵)/2   on the other steps

    Both rise from 0 to 1, so that singular values keep their order. Those far below the Frobenius norm go to
    zero: a matrix whose singular values are all alike has almost no step, and its size is not that of
    `consistent_rms`. More promotions keep more of them.

    Args:
      promotions: how many steps promote, from 0 to `steps`; 0 to 2 in the paper's experiments.
      steps: 5 as in the paper.

    Raises:
      TypeError, ValueError: `steps` is below 1, or `promotions` is not an integer from 0 to `steps`.

    Examples:
      >>> method = lambda x: gum_optax.newton_schulz(x, gum_optax.high_pass(2))
      >>> print(np.diagonal(method(jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0])))).round(2))
      [1.   1.   1.   0.01]
      >>> pion = gum_optax.muon(1e-3, orthogonalizer=method)

    References:
      Fan et al., Pion, arXiv 2605.19282, equations 7 and 8.
    """
    steps = check_integer("steps", steps, at_least=1)
    if check_integer("promotions", promotions, at_least=0) > steps:
        raise ValueError(f"promotions must be at most the number of steps, {steps}, got {promotions}.")
    return (_PROMOTION,) * promotions + (_SUPPRESSION,) * (steps - promotions)


def _as_wide(f: Orthogonalizer, x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Apply `f` to wide matrices, so that `X Xᵀ` is the smaller Gram matrix. Keeps the dtype of `x`.

    Large matrices go through `f` a few at a time (see `map_in_place`), so that the buffers of `f` have the
    size of a few matrices. Small matrices go through `f` as one stack, which is faster for tiny ones.
    """
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x
    *blocks, m, n = wide.shape
    if m * n < _LARGE or math.prod(blocks) == 1:
        result = f(wide).astype(x.dtype)
    else:
        result = map_in_place(f, wide.reshape(-1, m, n)).reshape(wide.shape)
    return result.mT if tall else result


def newton_schulz(
    x: Float[Array, "*b m n"], coefficients: Coefficients = JORDAN, dtype: Any = jnp.float32
) -> Float[Array, "*b m n"]:
    """Approximate the polar factor `U Vᵀ` of `x = U Σ Vᵀ` by odd quintic polynomials of `x`.

        X ← x/|x|_F,   then for each row (a, b, c):   X ← a X + (b A + c A²) X,   A = X Xᵀ

    The polynomial commutes with an orthonormal lift: `NS(P R) = P NS(R)`. It is scale invariant and maps
    zero to zero.

    Args:
      x: matrices in the last two axes, of any floating dtype.
      coefficients: one row per step; `JORDAN` (5 rows, singular values to about [0.7, 1.2]),
        `POLAR_EXPRESS` (8 rows, to 1 within 1e-5; `POLAR_EXPRESS[:5]` is between the two), or those of
        `high_pass`, which drop small singular values.
      dtype: the dtype of `X` and of the products; bfloat16, as in Jordan's code, is enough for `JORDAN`.

    Returns:
      Matrices of the shape and dtype of `x`. The products have JAX's default precision.

    Examples:
      >>> x = jax.random.normal(jax.random.key(0), (4, 8))
      >>> y = gum_optax.newton_schulz(x, gum_optax.POLAR_EXPRESS)
      >>> print(np.linalg.svd(y, compute_uv=False).round(3))
      [1. 1. 1. 1.]

    References:
      Jordan et al., Muon, https://kellerjordan.github.io/posts/muon; Amsel et al., The Polar
      Express, arXiv 2505.16932, Algorithm 1.
    """
    table = jnp.asarray(coefficients, dtype)

    def step(x, abc):
        a, b, c = abc
        gram = x @ x.mT  # A
        return a * x + (b * gram + c * (gram @ gram)) @ x

    def iterated(x):
        return repeat(step, to_unit_norm(x).astype(dtype), table)

    return _as_wide(iterated, x)


def gram_newton_schulz(
    x: Float[Array, "*b m n"], coefficients: Coefficients = JORDAN, restart: int = 3
) -> Float[Array, "*b m n"]:
    """`newton_schulz` on the `m × m` Gram matrix: the wider the matrix, the larger the gain in speed.

        X ← x/|x|_F,   then `restart` rows at a time:   A = X Xᵀ,  Q = I,
            for each row:   B = a I + b A + c A²,   Q ← B Q,   A ← B A B        X ← Q X

    Every `restart` rows take two products with `n` columns, where `newton_schulz` takes two per row. All
    products are in full float32: in bfloat16 the errors of `A` grow until the result diverges. An accelerator
    may therefore be faster with the plain form in its fast precision. The distance from `JORDAN` in float64,
    in spectral norm, is 2e-5 with `restart=3`, as for `newton_schulz`, and 1.3e-3 without restarts.

    Args:
      x: matrices in the last two axes, of any floating dtype.
      coefficients: as in `newton_schulz`.
      restart: how many rows one `A` serves before it is recomputed from `X`.

    Raises:
      TypeError, ValueError: `restart` is not an integer of at least 1.

    Examples:
      >>> x = jax.random.normal(jax.random.key(0), (4, 8))
      >>> y = gum_optax.gram_newton_schulz(x)
      >>> bool(jnp.allclose(y, gum_optax.newton_schulz(x), atol=1e-3))
      True
    """
    restart = check_integer("restart", restart, at_least=1)
    rows = list(coefficients)

    def run(x, rows):
        gram = exact_matmul(x, x.mT)  # A
        eye = q = jnp.broadcast_to(jnp.eye(x.shape[-2], dtype=gram.dtype), gram.shape)
        for i, (a, b, c) in enumerate(rows):
            factor = a * eye + b * gram + c * exact_matmul(gram, gram)  # B
            q = exact_matmul(factor, q) if i else factor
            if i + 1 < len(rows):
                gram = exact_matmul(exact_matmul(factor, gram), factor)
        return exact_matmul(q, x)

    def iterated(x):
        x = to_unit_norm(x)
        for start in range(0, len(rows), restart):
            x = run(x, rows[start : start + restart])
        return x

    return _as_wide(iterated, x)


def fastest_newton_schulz(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Newton-Schulz in the form that measured faster: the default of Muon's rule.

    On a CPU, matrices at least twice as wide as high go through `gram_newton_schulz` without restarts. Its
    result is up to 1.3e-3 from that of `newton_schulz` in spectral norm (measured, at conditions from 1e2 to
    1e7), and `newton_schulz` itself is 0.3 from the polar factor. All other matrices, and all matrices on
    other platforms, go through `newton_schulz`: the Gram form cannot use the fast precision of accelerators.

    Args:
      x: matrices in the last two axes, of any floating dtype.

    Examples:
      >>> x = jax.random.normal(jax.random.key(0), (4, 8))
      >>> y = gum_optax.fastest_newton_schulz(x)
      >>> bool(jnp.allclose(y, gum_optax.newton_schulz(x), atol=2e-3))
      True
    """
    short, long = sorted(x.shape[-2:])
    if long < _WIDE_ENOUGH * short:
        return newton_schulz(x)
    gram = functools.partial(gram_newton_schulz, restart=len(JORDAN))
    return jax.lax.platform_dependent(x, cpu=gram, default=newton_schulz)
