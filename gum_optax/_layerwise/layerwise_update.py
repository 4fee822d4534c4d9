"""A training step that never holds the gradients of all layers."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .._core.checks import check_function, check_integer, check_rule
from .._core.context import MatrixContext
from .._state.containers import clear_errors
from .division import KINDS, Division
from .layers import Layers
from .microbatches import Microbatches
from .refusals import check_uncoupled
from .turns import Step

_SIGNATURES = {
    "embed": "lambda own, batch: x",
    "layer": "lambda own, x: x",
    "head": "lambda own, x, batch: loss",
    "apply": "functools.partial(gum_optax.apply_updates, key=0, step=step)",
}


def _apply(params: Any, updates: Any, *, context: MatrixContext) -> Any:
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
    keep_every: int = 1,
    microbatches: int = 1,
    apply: Callable[..., Any] = _apply,
    **extra_args: Any,
) -> tuple[Float[Array, ""], Any, Any]:
    """One training step, whose backward pass uses up the gradient of a layer before it makes the next one.

        forward       x₀ = embed(E, batch),   xₗ₊₁ = layer(Wₗ, xₗ),   loss = head(H, x_L, batch)
        backward      of the head; then for l = L-1, ..., 0:   Gₗ, dxₗ from dxₗ₊₁;   Wₗ ← Wₗ + tx(Gₗ)
                      then of the embedding

    Parameters and state come out as `tx.update` of the whole gradient and `optax.apply_updates` make them, up
    to rounding, with the same random draws and metrics. In memory are the inputs `xₗ` of all layers, and the
    gradient and the activations of one layer. Donate `state` and `params`, and they are written in place.

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
      keep_every: the forward pass keeps the input of every `keep_every`-th layer, and the backward pass
        computes the others again from it. With k of L layers, L/k + k inputs are in memory, and every layer
        but one of k runs once more. It must divide the number of layers.
      microbatches: how many there are. If more than one, the first axis of every array of `batch` counts
        them, as for `projected_update`. The loss and the gradients are means over them. One microbatch at a
        time goes through a layer, and adds to the gradient of that layer alone, in float32. In memory are the
        inputs of the layers in all microbatches.
      apply: `(params, updates, *, context) -> params` in place of `optax.apply_updates`, for trees in which
        the leaves of other turns are zeros: see `MatrixContext.turn`. For weights in bfloat16:
        `functools.partial(gum_optax.apply_updates, key=0, step=step)`.
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
      TypeError: `tx` is not a transformation; `embed`, `layer`, `head` or `apply` is not a function; `layer`
        returns an `x` of another shape or dtype.

    Examples:
      >>> params = {"embed": jnp.ones((5, 4)), "layers": jnp.ones((3, 4, 4)), "head": jnp.ones((4, 5))}
      >>> tx = gum_optax.adalomo(1e-2)
      >>> def train_step(params, state, tokens):
      ...     embed, layer = lambda w, tokens: w[tokens], lambda w, x: jnp.tanh(x @ w)
      ...     head = lambda w, x, tokens: jnp.mean((x @ w) ** 2)
      ...     return gum_optax.layerwise_update(tx, embed, layer, head, tokens, state, params)
      >>> step = jax.jit(train_step, donate_argnums=(0, 1))  # writes them in place
      >>> first, params, state = step(params, tx.init(params), jnp.arange(5))
      >>> second, params, state = step(params, state, jnp.arange(5))
      >>> bool(second < first)
      True
    """
    check_rule("tx", tx)
    for name, function in (("embed", embed), ("layer", layer), ("head", head), ("apply", apply)):
        check_function(name, function, _SIGNATURES[name])
    division = Division(params)
    keep_every = check_integer("keep_every", keep_every, at_least=1)
    if division.count % keep_every:
        raise ValueError(f"keep_every must divide the {division.count} layers, got {keep_every}.")
    if not per_layer:
        check_uncoupled(tx, division, params, state, extra_args)
    each = Microbatches(batch, check_integer("microbatches", microbatches, at_least=1))
    layers = Layers(division, each, layer, keep_every)
    divided = division.divide(params)
    parts = {kind: divided.of_kind(kind)[0] for kind in KINDS}

    def embed_part(own, x, batch):
        del x
        return embed(own, batch)

    def head_part(own_and_table, x, batch):
        own, table = own_and_table
        return head(own, x, batch, table) if tied else head(own, x, batch)

    x = each.outputs(embed_part, parts["embed"], None)
    x, inputs = layers.forward(parts["layers"], x)
    own_and_table = parts["head"], parts["embed"] if tied else None
    losses, (gradient, of_table), dx = each.pulled_back(head_part, own_and_table, x)
    if jnp.shape(losses) != ((microbatches,) if microbatches > 1 else ()):
        raise ValueError(f"head must return the loss, a scalar; got shape {jnp.shape(losses)}.")
    loss = jnp.mean(losses)
    with clear_errors(tx, params, state, params):
        step = Step(tx, division, params, state, jnp.isfinite(loss), apply, extra_args)
        step.take("head", gradient)
        dx = layers.backward(step, inputs, step.after_head(dx))
        _, gradient, _ = each.pulled_back(embed_part, parts["embed"], None, dx)
        step.take("embed", optax.tree.add(gradient, of_table) if tied else gradient)
        return loss, *step.finished()
