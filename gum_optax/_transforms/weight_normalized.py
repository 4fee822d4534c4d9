"""Weights as a direction and a magnitude, without a copy of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .._core.checks import check_rule
from .._linalg.numerics import norm, safe_reciprocal


class WeightNormalizedState(NamedTuple):
    """State of `weight_normalized`.

    Examples:
      >>> rule = gum_optax.weight_normalized(optax.adam(1e-2), optax.adam(1e-2))
      >>> state = rule.init({"kernel": jnp.ones((4, 8))})
      >>> optax.tree.get(state.magnitude, "mu")["kernel"].shape
      (1, 8)
    """

    direction: Any  # of `inner`
    magnitude: Any  # over leaves (*blocks, 1, fan_out)


def weight_normalized(
    inner: optax.GradientTransformation, magnitude: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Train direction and magnitude of each neuron by optimizers of their own, without a copy of the weights.

        ν = |W|,   Ŵ = W / ν          of each column: the norm over the inputs of a neuron
        γ = sum(G ∘ Ŵ),   T = G - Ŵ γ                  the gradients of magnitude and direction
        Δv = inner(T),   Δg = magnitude(γ)             steps down, learning rates in them
        W ← (ν + Δg) (W + Δv) / |W + Δv|

    This is weight normalization with `|v| = g` restored in every step, the exact form of GradNormLoRP, which
    has GaLore inside, as in the example. Its state is then `m r + 2 r n + 2 fan_out` numbers. The authors'
    file (Jhhuangkay at 66c8e767) differs: it leaves out the second term of `T`, sets the magnitude back to
    `|v|` in every step, so that what it learned is lost, and holds a full copy `v` of the weight. To first
    order in the steps both optimizers of plain SGD together are SGD. Decay of `W` by `inner` changes no
    direction: give it to `magnitude`.

    Args:
      inner: an optimizer for the direction, its learning rate included; sees the weights.
      magnitude: one for the norms, `(*blocks, 1, fan_out)`, which it sees as parameters.

    Returns:
      A transformation over trees of `(*blocks, fan_in, fan_out)` leaves, whose step goes down the gradient
      and whose update needs the parameters. A column of zeros, which has no direction, steps by `Δv`.

    Raises:
      TypeError, ValueError: an argument is not a transformation; at the update, there are no parameters.

    Examples:
      >>> galore = gum_optax.as_matrices(gum_optax.low_rank(optax.scale_by_adam(), 2, 250))
      >>> inner = optax.chain(galore, optax.scale(0.25), optax.scale_by_learning_rate(1e-2))
      >>> rule = optax.chain(gum_optax.weight_normalized(inner, optax.adam(1e-2)), optax.scale(-1.0))
      >>> tx = gum_optax.matrix_optimizer(rule, 1.0, 1.0, wide=False, others=optax.adamw(1e-2))
      >>> gum_optax.memory_report(tx, {"kernel": jnp.ones((4, 8))}).state  # bytes
      {'projectors': 32, 'mu': 96, 'nu': 96, 'bookkeeping': 44}

    References:
      Huang et al., GradNormLoRP, arXiv 2412.19616; Salimans and Kingma, arXiv 1602.07868.
    """
    of_direction = optax.with_extra_args_support(check_rule("inner", inner))
    of_magnitude = optax.with_extra_args_support(check_rule("magnitude", magnitude))

    def init(params):
        return WeightNormalizedState(inner.init(_wide(params)), magnitude.init(_norms(params)))

    def update(updates, state, params=None, **extra_args):
        if params is None and jax.tree.leaves(updates):
            raise ValueError("weight_normalized needs the parameters: call update(gradients, state, params).")
        params, norms = _wide(params), _norms(params)
        units = jax.tree.map(lambda w, nu: w * safe_reciprocal(nu), params, norms)
        gammas = jax.tree.map(lambda g, unit: jnp.sum(g * unit, axis=-2, keepdims=True), updates, units)
        tangents = jax.tree.map(lambda g, unit, gamma: g - unit * gamma, updates, units, gammas)
        moves, direction = of_direction.update(tangents, state.direction, params, **extra_args)
        lengthenings, lengths = of_magnitude.update(gammas, state.magnitude, norms, **extra_args)
        steps = jax.tree.map(_step, params, norms, moves, lengthenings)
        return steps, WeightNormalizedState(direction, lengths)

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(params: Any) -> Any:
    """The weights in float32, so that the state of both optimizers is float32 too."""
    return jax.tree.map(lambda w: w.astype(jnp.float32), params)


def _norms(params: Any) -> Any:
    """The norm of each column of each weight."""
    return jax.tree.map(lambda w: norm(w, -2), params)


def _step(
    w: Float[Array, "*b m n"],
    nu: Float[Array, "*b 1 n"],
    move: Float[Array, "*b m n"],
    lengthening: Float[Array, "*b 1 n"],
) -> Float[Array, "*b m n"]:
    """`(ν + Δg) (W + Δv) / |W + Δv| - W`; `Δv` where `W` is zero."""
    moved = w + move
    new = (nu + lengthening) * safe_reciprocal(norm(moved, -2)) * moved
    return jnp.where(nu > 0, new - w, move)
