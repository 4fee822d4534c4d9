"""Two rules, one after the other, on one state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from ._checks import check_integer, check_rule


class SwitchState(NamedTuple):
    """State of `switch`."""

    count: Int[Array, ""]  # steps taken  # pyright: ignore[reportIncompatibleMethodOverride]
    inner: Any


def switch(
    steps: int, first: optax.GradientTransformation, then: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`first` for so many steps, and `then` from there on, on the state that `first` leaves.

    For rules that differ in a function and not in their state: another finder, another orthogonalizer.

    Args:
      steps: taken by `first`; 0 is `then` alone.
      first, then: rules with states of one structure.

    Raises:
      TypeError, ValueError: an argument of the wrong type; at `init`, states that differ.
    """
    steps = check_integer("steps", steps, at_least=0)
    first = optax.with_extra_args_support(check_rule("first", first))
    then = optax.with_extra_args_support(check_rule("then", then))

    def init(params):
        before, after = jax.eval_shape(first.init, params), jax.eval_shape(then.init, params)
        if jax.tree.structure(before) != jax.tree.structure(after) or any(
            a.shape != b.shape or a.dtype != b.dtype
            for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        ):
            raise ValueError(f"first and then must have states of one structure, got {before} and {after}.")
        return SwitchState(jnp.zeros((), jnp.int32), first.init(params))

    def update(updates, state, params=None, **extra_args):
        def by(rule):
            return lambda g, s, p: rule.update(g, s, p, **extra_args)

        operands = (updates, state.inner, params)
        result, inner = jax.lax.cond(state.count < steps, by(first), by(then), *operands)
        return result, SwitchState(jnp.asarray(optax.safe_increment(state.count)), inner)

    return optax.GradientTransformationExtraArgs(init, update)
