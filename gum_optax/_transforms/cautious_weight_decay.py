"""Cautious weight decay: decay only where the step agrees."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.checks import check_number


def cautious_weight_decay(weight_decay: Any, mask: Any = None) -> optax.GradientTransformation:
    """Decay only the numbers that the step moves towards zero.

        u ← u + λ 1[u W >= 0] W

    `u` points up the gradient, and the learning rate follows, as with `optax.add_decayed_weights`. Every
    optimizer of this library takes the rule in place of the number `weight_decay`.

    Args:
      weight_decay: `λ`; the paper takes the usual one.
      mask: a tree of booleans, or a function from the parameters to one, as in `optax.add_decayed_weights`.

    Returns:
      A stateless transformation over trees of any shapes. Its update needs the parameters.

    Raises:
      TypeError, ValueError: `weight_decay` is not a number of at least 0; at the update, parameters are
        missing.

    Examples:
      >>> rule, w = gum_optax.cautious_weight_decay(0.5), jnp.array([2.0, -2.0, -2.0])
      >>> steps, state = rule.update(jnp.array([1.0, 1.0, -1.0]), rule.init(w), w)
      >>> steps.tolist()
      [2.0, 1.0, -2.0]
      >>> tx = gum_optax.gum(1e-3, weight_decay=rule)

    References:
      Chen et al., Cautious Weight Decay, arXiv 2510.12402, Algorithm 1.
    """
    weight_decay = check_number("weight_decay", weight_decay, at_least=0)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("Weight decay needs the parameters: call update(gradients, state, params).")

        def decayed(u: Any, w: Any) -> Any:
            dtype = jnp.result_type(u)
            decay = jnp.asarray(weight_decay, dtype) * jnp.asarray(w, dtype)
            # Signs are compared, for a product of small numbers would be zero.
            agrees = jnp.where(u > 0, w >= 0, jnp.where(u < 0, w <= 0, True))
            return u + jnp.where(agrees, decay, 0)

        return jax.tree.map(decayed, updates, params), state

    rule = optax.GradientTransformation(optax.init_empty_state, update)
    return rule if mask is None else optax.masked(rule, mask)
