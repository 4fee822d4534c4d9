"""Adds steps to weights in bfloat16 with stochastic rounding, so that small steps are not lost."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from .._core.checks import check_rule
from .._core.context import NO_CONTEXT, MatrixContext
from .._core.keys import check_key_and_step, key_data, typed
from .._linalg.rounding import ROUNDED, noise_of_rows, round_by
from .._mesh.explicit import on_auto_axes
from .storage import keys_of_leaves

# Keeps these bits apart from those of other functions that get the same key.
_STREAM = zlib.crc32(b"apply_updates")


def apply_updates(
    params: optax.Params,
    updates: optax.Updates,
    key: Any,
    step: Any,
    *,
    context: MatrixContext = NO_CONTEXT,
) -> optax.Params:
    """`optax.apply_updates` that rounds weights in bfloat16 or float16 stochastically.

        W ← W + U in float32, then one of the two numbers of W's dtype around it:
        P(above) = (W + U - below) / (above - below)

    Rounding to nearest loses every step below a 512th of a bfloat16 weight. Here the mean of the result is
    `W + U`, so that no float32 copy of the weights is needed. Leaves of other dtypes get optax's result. A
    sum that is not finite stays so; beyond the largest number of the dtype, rounding is to nearest.

    Wrap the optimizer in `float32_steps`, so that the updates of bfloat16 weights are not rounded on the way.
    For a step layer by layer, pass `apply=functools.partial(gum_optax.apply_updates, key=0, step=step)` to
    `layerwise_update`.

    The bits are a function of key, step, leaf and position: a resumed run, a sharded one, and one that takes
    a layer at a time draw the same. Inside `jax.shard_map`, positions are those in a device's shard: fold
    `jax.lax.axis_index` into the key if the weights are sharded.

    Args:
      params: the weights.
      updates: the steps, a tree like `params`; of any dtype.
      key: an integer seed or a JAX key. One key serves a whole run.
      step: the number of the step, an integer; may be traced.
      context: what `layerwise_update` passes to the function `apply`, so that each layer draws the bits that
        the whole model would. By default `params` is the whole model.

    Returns:
      The new weights, with the structure, shapes and dtypes of `params`.

    Raises:
      TypeError: `key` is no threefry key or seed, or `step` is no integer.

    Examples:
      >>> params, updates = jnp.ones((64, 64), jnp.bfloat16), jnp.full((64, 64), 1e-3)
      >>> nearest = optax.apply_updates(params, updates)
      >>> params = gum_optax.apply_updates(params, updates, key=0, step=0)
      >>> [round(float(x.mean(dtype=jnp.float32)), 3) for x in (nearest, params)]
      [1.0, 1.001]
    """
    step = check_key_and_step(key, step)
    own = jax.random.key_data(jax.random.fold_in(typed(key_data(key)), _STREAM))
    keys = keys_of_leaves(params, own, step, context.turn)
    rows = jax.tree.structure(params).unflatten(context.turn.rows(params))

    def added(p: Any, u: Any, leaf_key: Any, row: Any) -> Any:
        if p is None:
            return None
        if jnp.result_type(p) not in ROUNDED:
            return optax.apply_updates(p, u)
        return _rounded_sum(jnp.asarray(p), jnp.asarray(u), leaf_key, row)

    return jax.tree.map(added, params, updates, keys, rows, is_leaf=lambda x: x is None)


def float32_steps(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run `inner` as if weights in bfloat16 or float16 were float32: so are its state and its updates.

    An optimizer returns updates in the dtype of the weights, and most rules of optax keep their state in it,
    too. Updates in bfloat16 have eight bits: `1.002 η`, a step of one and its decay, becomes `η`, and a
    weight decays no more. The updates of this wrapper are what `apply_updates` adds in float32.

    No float32 copy of the weights is made: XLA converts them where decay reads them. A state from before
    stays valid if `inner` is an optimizer of this library, whose state is float32 anyway.

    Args:
      inner: any transformation. It gets gradients in their own dtype.

    Returns:
      A transformation with the state of `inner`.

    Examples:
      >>> tx = gum_optax.sinkgd(1e-3, weight_decay=0.1)
      >>> params = {"kernel": jnp.ones((4, 8), jnp.bfloat16)}
      >>> wrapped = gum_optax.float32_steps(tx)
      >>> updates, state = wrapped.update(params, wrapped.init(params), params)
      >>> updates["kernel"].dtype.name
      'float32'
    """
    taking = optax.with_extra_args_support(check_rule("inner", inner))

    def in_float32(tree):
        def of(x):
            shape, dtype = jnp.shape(x), jnp.result_type(x)
            if dtype not in ROUNDED:
                return x
            abstract = isinstance(x, jax.ShapeDtypeStruct)
            return jax.ShapeDtypeStruct(shape, jnp.float32) if abstract else jnp.asarray(x, jnp.float32)

        return jax.tree.map(of, tree)

    def update(updates, state, params=None, **extra_args):
        # Without parameters, the dtype of the gradients decides.
        updates, params = (in_float32(updates), None) if params is None else (updates, in_float32(params))
        return taking.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(in_float32(params)), update)


def _rounded_sum(p: Array, u: Array, leaf_key: PRNGKeyArray, first: Any) -> Array:
    """`p + u` of one leaf, or of the row `first` of a stack, on a mesh of any kind of axes."""

    def inside(p, state, u, context, extra_args):
        del context
        # Every leaf becomes `(layers, *rows, n)`.
        shape = (*p.shape, *(1,) * (2 - p.ndim))
        u = jnp.broadcast_to(u, p.shape).reshape(shape)
        return _add(p.reshape(shape), u, **extra_args).reshape(p.shape), state

    extra_args = {"leaf_key": leaf_key, "first": jnp.asarray(first, jnp.int32)}
    return on_auto_axes(inside)(p, (), u, NO_CONTEXT, extra_args)[0]


@jax.jit  # traced once for all leaves of a shape
def _add(
    p: Float[Array, "layers *rows n"], u: Float[Array, "layers *rows n"], leaf_key: PRNGKeyArray, first: Any
) -> Float[Array, "layers *rows n"]:
    """`p + u`, whose layers have the indices `first`, `first + 1`, ..."""
    noise = noise_of_rows(leaf_key, first, p.shape)
    return round_by(noise, p.astype(jnp.float32) + u.astype(jnp.float32), p.dtype)
