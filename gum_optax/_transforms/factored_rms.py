"""Adafactor's second moment, and steps of the size of the parameters: for each matrix of a stack."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from .._core.checks import check_number
from .._linalg.numerics import LARGEST, rms
from .._mesh.explicit import zeros
from .per_matrix import per_matrix


class FactoredRmsState(NamedTuple):
    """State of `scale_by_factored_rms`.

    Examples:
      >>> state = gum_optax.scale_by_factored_rms().init({"kernel": jnp.ones((3, 4, 8))})
      >>> state.rows["kernel"].shape, state.columns["kernel"].shape
      ((3, 4, 1), (3, 1, 8))
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    rows: optax.Updates  # r, each leaf (*blocks, m, 1) float32: mean squares over the columns
    columns: optax.Updates  # c, each leaf (*blocks, 1, n) float32: mean squares over the rows


def row_and_column(x: Float[Array, "*b m n"]) -> tuple[Float[Array, "*b m 1"], Float[Array, "*b 1 n"]]:
    """The mean over the columns and the mean over the rows of each matrix."""
    return jnp.mean(x, axis=-1, keepdims=True), jnp.mean(x, axis=-2, keepdims=True)


def over_root(
    g: Float[Array, "*b m n"], r: Float[Array, "*b m 1"], c: Float[Array, "*b 1 n"]
) -> Float[Array, "*b m n"]:
    """`G / √(r cᵀ / mean(r))`, with each root by itself: a quotient of squares may underflow."""
    root_of_mean = jnp.sqrt(jnp.mean(r, axis=-2, keepdims=True))
    return g * jax.lax.rsqrt(r) * (root_of_mean * jax.lax.rsqrt(c))


def clip_rms(u: Float[Array, "*b m n"], threshold: Any) -> Float[Array, "*b m n"]:
    """`U / max(1, RMS(U) / threshold)` of each matrix."""
    return u / jnp.maximum(1, rms(u) / threshold)


def check_divisor(name: str, value: Any) -> Any:
    """Check for a number that float32 can divide by, and by whose root after that."""
    return check_number(name, value, at_least=1e-35)


def scale_by_factored_rms(decay_rate: Any = 0.8, eps: Any = 1e-30) -> optax.GradientTransformationExtraArgs:
    """Divide by the root of a second moment that is kept as a row and a column: Adafactor's.

        S = G² + ε
        r ← β r + (1 - β) mean(S over columns),   c ← β c + (1 - β) mean(S over rows),   β = 1 - t^-decay_rate
        step = G / √(r cᵀ / mean(r))

    `optax.scale_by_factored_rms` factors the two largest axes of a leaf; this one factors each matrix of a
    stack by itself. For one matrix both give the same. A row `(*blocks, 1, n)` has a full second moment, as
    vectors have there.

    Args:
      decay_rate: how fast `β` goes to 1; 0.8 as in Adafactor.
      eps: `ε`, at least 1e-35; 1e-30 as in Adafactor.

    Returns:
      A transformation over trees of `(*blocks, m, n)` leaves. State: `m + n` numbers per matrix.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type; at `init`, a leaf is no matrix.

    Examples:
      >>> gradients = {"kernel": jnp.outer(jnp.arange(1.0, 5.0), jnp.arange(1.0, 9.0))}
      >>> rule = gum_optax.scale_by_factored_rms()
      >>> steps, state = rule.update(gradients, rule.init(gradients))
      >>> bool(jnp.allclose(steps["kernel"], 1.0, atol=1e-5))  # at rank 1 a row and a column are exact
      True

    References:
      Shazeer and Stern, Adafactor, arXiv 1804.04235, Algorithm 4.
    """
    decay_rate = check_number("decay_rate", decay_rate, at_least=0)
    eps = check_divisor("eps", eps)

    def init(key, leaf):
        del key
        return zeros(leaf, -2, 1), zeros(leaf, 1, -1)

    def update(count, g, r, c):
        beta = 1 - count.astype(jnp.float32) ** -decay_rate
        g = jnp.clip(g, -LARGEST, LARGEST)
        row, column = row_and_column(g * g + eps)
        r, c = beta * r + (1 - beta) * row, beta * c + (1 - beta) * column
        return over_root(g, r, c), r, c

    return per_matrix(FactoredRmsState, init, update)


def clip_by_rms(threshold: Any = 1.0) -> optax.GradientTransformation:
    """Let the root mean square of each matrix be at most `threshold`.

        U ← U / max(1, RMS(U) / threshold)

    Args:
      threshold: `d`; 1 as in Adafactor.

    Raises:
      TypeError, ValueError: `threshold` is no number of at least 1e-35.

    Examples:
      >>> steps = [jnp.full((4, 8), 3.0), jnp.full((4, 8), 0.5)]
      >>> rule = gum_optax.clip_by_rms(1.0)
      >>> clipped, state = rule.update(steps, rule.init(steps))
      >>> [round(float(x[0, 0]), 3) for x in clipped]
      [1.0, 0.5]
    """
    threshold = check_divisor("threshold", threshold)
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: clip_rms(u, threshold), updates))


def scale_by_parameter_rms(eps: Any = 1e-3) -> optax.GradientTransformation:
    """Multiply the step of each matrix by the root mean square of the matrix itself.

        step = max(ε, RMS(W)) U

    Args:
      eps: `ε`, so that a matrix of zeros moves; 1e-3 as in Adafactor.

    Returns:
      A stateless transformation, whose update needs the parameters.

    Raises:
      TypeError, ValueError: `eps` is out of range; at the update, there are no parameters.

    Examples:
      >>> params, steps = [jnp.full((4, 8), 2.0), jnp.zeros((4, 8))], [jnp.ones((4, 8)), jnp.ones((4, 8))]
      >>> rule = gum_optax.scale_by_parameter_rms(1e-3)
      >>> steps, state = rule.update(steps, rule.init(params), params)
      >>> [round(float(x[0, 0]), 3) for x in steps]
      [2.0, 0.001]
    """
    eps = check_number("eps", eps, at_least=0)

    def update(updates: Any, params: Any) -> Any:
        if params is None and jax.tree.leaves(updates):
            raise ValueError("the step is relative to the parameters: call update(gradients, state, params).")
        return jax.tree.map(lambda u, w: jnp.maximum(eps, rms(w)) * u, updates, params)

    return optax.stateless(update)
