"""A training step that never holds the gradients of all layers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .._core.checks import check_function, check_rule
from .._core.context import MatrixContext
from .._core.xla import depend_on
from .division import Division
from .refusals import check_uncoupled
from .turns import Step


def _apply(params: Any, updates: Any, context: MatrixContext) -> Any:
    del context
    return optax.apply_updates(params, updates)


def layerwise_update(
    tx: optax.GradientTransformation,
    embed: Callable[..., Any],
    layer: Callable[..., Any],
    head: Callable[..., Any],
    batch: Any,
    state: Any,
    params: Any,
    *,
    tied: bool = False,
    per_layer: bool = False,
    apply: Callable[..., Any] = _apply,
    **extra_args: Any,
) -> tuple[Float[Array, ""], Any, Any]:
    """One training step, whose backward pass uses up the gradient of a layer before it makes the next one.

        forward       x₀ = embed(E, batch),   xₗ₊₁ = layer(Wₗ, xₗ),   loss = head(H, x_L, batch)
        backward      of the head; then for l = L-1, ..., 0:   Gₗ, dxₗ from dxₗ₊₁;   Wₗ ← Wₗ + tx(Gₗ)
                      then of the embedding

    Parameters and state come out as `tx.update` of the whole gradient and `optax.apply_updates` make them, up
    to rounding, with the same random draws and metrics. In memory are the inputs `xₗ` of all layers, and the
    gradient and the activations of one layer. Donate `state` and `params`, and they are written in place:

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def train_step(params, state, batch):
            loss, params, state = layerwise_update(tx, embed, layer, head, batch, state, params)
            return params, state, loss

    What every layer reads besides its parameters, such as a mask or the tables of rotary positions, is
    computed before and closed over: `lambda w, x: block(w, x, mask)`. A loss that layers contribute to, such
    as that of a router, travels in `x`, a tree of floating-point arrays.

    Args:
      tx: any optimizer of this library, or a rule of optax that treats every number by itself, such as
        `optax.adamw`.
      embed: `(params["embed"], batch) -> x`.
      layer: `(the parameters of one layer, x) -> x`.
      head: `(params["head"], x, batch) -> loss`, a scalar. With `tied`: `(params["head"], x, batch,
        params["embed"])`.
      batch: whatever `embed` and `head` read.
      state: of `tx`, from `tx.init(params)`.
      params: a mapping with the entries `embed`, `layers` and `head`, any trees. `layers` are arrays whose
        first axis counts the layers, or a sequence of equal trees; XLA compiles a stack of layers once.
      tied: whether the head reads the parameters of the embedding. Their gradient from the head then stays in
        memory during the backward pass.
      per_layer: whether a rule that combines several gradients, such as `optax.clip_by_global_norm`, may see
        those of one layer at a time. By default such a rule is refused, for the result would not be that of
        `tx.update`.
      apply: `(params, updates, context) -> params` in place of `optax.apply_updates`, for trees in which the
        leaves of other turns are zeros: see `MatrixContext.turn`.
      extra_args: for `tx.update`.

    Returns:
      The loss, the new parameters and the new state. If the loss is not finite, parameters and state are as
      they were, except for the count of skipped steps. An optimizer of this library that gets a gradient that
      is not finite from one layer keeps the parameters and the state of that layer, and counts the step as
      skipped. Other layers step; what all leaves share, such as the count of a schedule, stays.

    Raises:
      ValueError: `params` does not have these entries, or its layers are not equal; `tx` needs the gradients
        of several layers at once; it runs an optimizer of this library within a conditional, as
        `optax.MultiSteps` does.
      TypeError: `tx` is not a transformation, or `embed`, `layer` or `head` is not a function.
    """
    check_rule("tx", tx)
    for name, function in (("embed", embed), ("layer", layer), ("head", head)):
        check_function(name, function, "a function of the parameters")
    division = Division(params)
    if not per_layer:
        check_uncoupled(tx, division, params, state, extra_args)
    parts = {kind: division.divide(params).of_kind(kind)[0] for kind in ("embed", "layers", "head")}
    x = embed(parts["embed"], batch)
    x, inputs = _forward(division, layer, parts["layers"], x)

    def loss_of(own, table, x):
        return head(own, x, batch, table) if tied else head(own, x, batch)

    loss, pull = jax.vjp(loss_of, parts["head"], parts["embed"] if tied else None, x)
    gradient, of_table, dx = pull(jnp.ones_like(loss))
    step = Step(tx, division, params, state, jnp.isfinite(loss), apply, extra_args)
    step.take("head", gradient)
    dx = _backward(step, division, layer, inputs, dx)
    _, pull = jax.vjp(lambda own: embed(own, batch), parts["embed"])
    (gradient,) = pull(dx)
    step.take("embed", optax.tree.add(gradient, of_table) if tied else gradient)
    return loss, *step.finished()


def _forward(division: Division, layer: Callable[..., Any], layers: Any, x: Any) -> tuple[Any, Any]:
    """The output of the last layer, and the input of each layer."""
    if division.is_stacked:
        return jax.lax.scan(lambda x, own: (layer(own, x), x), x, layers)
    inputs = []
    for number in range(division.count):
        inputs.append(x)
        x = layer(division.one_layer(division.layer(layers, number)), x)
    return x, inputs


def _pulled_back(layer: Any, own: Any, x: Any, dx: Any) -> tuple[Any, Any]:
    """The gradients of one layer's parameters and of its input.

    On a CPU the former wait for the latter, which reads the parameters: if they were overwritten before, XLA
    would copy the whole stack for it.
    """
    _, pull = jax.vjp(layer, own, x)
    gradient, dx = pull(dx)
    last = [leaf for leaf in jax.tree.leaves(dx) if leaf.size][-1:]
    return jax.tree.map(lambda g: functools.reduce(depend_on, last, g), gradient), dx


def _backward(step: Step, division: Division, layer: Any, inputs: Any, dx: Any) -> Any:
    """Takes the step of every layer, from the last to the first; the gradient of the first layer's input."""
    if division.is_stacked:

        def turn(i, carried):
            dx, carry = carried
            number = division.count - 1 - i
            x = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), inputs)
            gradient, dx = _pulled_back(layer, step.layer_of(carry, number), x, dx)
            return dx, step.with_layer(carry, number, gradient)

        dx, carry = jax.lax.fori_loop(0, division.count, turn, (dx, step.carry()))
        step.carried(carry)
        return dx

    for number in reversed(range(division.count)):
        gradient, dx = _pulled_back(layer, step.layer_of(step.carry(), number), inputs[number], dx)
        step.carried(step.with_layer(step.carry(), number, gradient))
        dx = step.after(dx, number)
    return dx
