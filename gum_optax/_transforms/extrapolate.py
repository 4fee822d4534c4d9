"""Gradients at extrapolated parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._core.checks import check_rule
from .._core.context import NO_CONTEXT, MatrixContext
from .._core.trees import is_masked, is_state_field
from .._linalg.numerics import is_finite, wide_dtype


class ExtrapolateState(NamedTuple):
    """State of `extrapolate`.

    Examples:
      >>> tx, params = gum_optax.extrapolate(optax.sgd(0.5), optax.scale(0.25)), {"w": jnp.ones(1)}
      >>> updates, state = tx.update({"w": jnp.full(1, 4.0)}, tx.init(params), params)
      >>> state.extrapolation["w"].tolist()
      [-1.0]
    """

    extrapolation: optax.Updates  # E, where the parameters stand beside those to evaluate; like them, float32
    direction: Any  # state of the direction's rule
    inner: Any


def extrapolate(
    inner: optax.GradientTransformation, direction: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Take the gradients at parameters that are ahead by a step of another rule from the last gradient.

        Y = W + E                       the parameters that the model holds; G = ∇f(Y)
        W ← W + inner(G, W),   E ← -direction(G)

    With `direction=optax.scale(γ)` this is extrapolation from the past, an extragradient method of one
    gradient a step, for large batches. Another direction is any rule, such as a scaled
    `optax.scale_by_sign()`, or noise by `optax.chain(optax.set_to_zero(), optax.add_noise(...))`. It goes
    outside the whole optimizer, and the parameters to evaluate and to save are `evaluation_parameters`.

    With `optax.sgd(η)` inside it is `optax.optimistic_gradient_descent(η, 1.0, γ/η)`, which takes the first
    gradient for the last one of its first step, so that it lacks the shift by `-γ G₀`. A fresh gradient for
    the extrapolation, two gradients a step, is `optax.contrib.sam(inner, optax.scale(γ), sync_period=2)`.

    The paper's own algorithm was not to be found; this follows second-hand code (koncle/tmp at 79d6256) as
    it means to work. There, workers extrapolate by gradients of their own.

    Put `protect` inside, so that it is `W` that keeps off its subspaces. `layerwise_update` refuses this
    rule.

    Args:
      inner: the optimizer, which sees `W` as the parameters.
      direction: a rule whose step points up the gradient, its scale included.

    Returns:
      A transformation whose update needs the parameters. State: that of `inner` and a number for each
      parameter. A leaf whose gradient is not finite keeps its extrapolation.

    Raises:
      TypeError, ValueError: an argument is not a transformation; at the update, there are no parameters.

    Examples:
      >>> tx = gum_optax.extrapolate(optax.sgd(0.5), optax.scale(0.25))
      >>> params = {"w": jnp.ones(1)}
      >>> updates, state = tx.update({"w": jnp.full(1, 4.0)}, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["w"].tolist(), gum_optax.evaluation_parameters(state, params)["w"].tolist()  # Y, W
      ([-2.0], [-1.0])

    References:
      Lin et al., Extrapolation for Large-batch Training, arXiv 2006.05720.
    """
    taking = optax.with_extra_args_support(check_rule("inner", inner))
    ahead = optax.with_extra_args_support(check_rule("direction", direction))

    def init(params):
        none = jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), wide_dtype(w)), params)
        return ExtrapolateState(none, ahead.init(params), taking.init(params))

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        if params is None:
            raise ValueError("extrapolate needs the parameters: call update(gradients, state, params).")
        context.need_gradient("extrapolate")
        extra_args["context"] = context
        origin = evaluation_parameters(state, params)
        steps, inner_state = taking.update(updates, state.inner, origin, **extra_args)
        finite = jax.tree.map(is_finite, updates)
        clean = jax.tree.map(lambda g, yes: jnp.where(yes, g, 0), updates, finite)
        found, direction_state = ahead.update(clean, state.direction, origin, **extra_args)
        new = jax.tree.map(
            lambda d, e, yes: jnp.where(yes, -d.astype(e.dtype), e), found, state.extrapolation, finite
        )
        moves = jax.tree.map(
            lambda s, e, before: (s + (e - before)).astype(s.dtype), steps, new, state.extrapolation
        )
        return moves, ExtrapolateState(new, direction_state, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def evaluation_parameters(state: optax.OptState, params: optax.Params) -> optax.Params:
    """The parameters `W` to evaluate and to save, from those of a training step with `extrapolate`.

    Args:
      state: of `extrapolate`, or of an optimizer that has it in a chain.
      params: `Y = W + E`; also an `nnx.State` beside the state of an `nnx.Optimizer`.

    Raises:
      ValueError: there is no `extrapolate` in the state, or it is of other parameters.
      KeyError: there are several.

    Examples:
      >>> tx, params = gum_optax.extrapolate(optax.sgd(0.5), optax.scale(0.25)), {"w": jnp.ones(1)}
      >>> updates, state = tx.update({"w": jnp.full(1, 4.0)}, tx.init(params), params)
      >>> gum_optax.evaluation_parameters(state, optax.apply_updates(params, updates))["w"].tolist()
      [-1.0]
    """
    extrapolation = optax.tree.get(state, "extrapolation", filtering=is_state_field)
    if extrapolation is None:
        raise ValueError(f"evaluation_parameters needs a state of extrapolate, got {type(state).__name__}.")
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_masked)
    shifts = jax.tree.leaves(extrapolation, is_leaf=is_masked)
    if len(leaves) != len(shifts):
        raise ValueError(
            f"the state extrapolates {len(shifts)} leaves, and the parameters have {len(leaves)}; in Flax NNX"
            " pass nnx.state(model, nnx.Param)."
        )
    rows = zip(leaves, shifts, strict=True)
    return treedef.unflatten([y if is_masked(e) else (y - e).astype(jnp.result_type(y)) for y, e in rows])
