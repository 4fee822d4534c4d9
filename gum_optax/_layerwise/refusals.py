"""Refuses an optimizer that needs the gradients of several layers at once."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.context import MatrixContext
from .._core.trees import key_name
from .._core.turns import Probe
from .coupling import Origin, origins_of
from .division import SHARED, Division


def check_uncoupled(
    tx: optax.GradientTransformation, division: Division, params: Any, state: Any, extra_args: dict[str, Any]
) -> None:
    """Follow the gradients through an update of the whole tree, which is only traced.

    The rules of this library, which know how to work layer by layer, stand aside in the trace.

    Raises:
      ValueError: the update or the state of a layer, of the embedding or of the head depends on another's
        gradient, or the state that they share depends on any.
    """
    update = optax.with_extra_args_support(tx).update

    def traced(updates, state, params):
        context = MatrixContext(turn=Probe())
        return update(updates, state, params, context=context, **extra_args)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), (params, state))
    trees = shapes[0], shapes[1], shapes[0]
    before = [_owned(division, tree) for tree in trees]
    of_updates, of_state = origins_of(traced, trees, before)
    for found, tree in ((of_updates, params), (of_state, state)):
        rows = jax.tree_util.tree_leaves_with_path(found)
        allowed = jax.tree.leaves(_owned(division, tree))
        for (path, origin), own in zip(rows, allowed, strict=True):
            if origin.owners and origin != own:
                raise ValueError(_message(path, origin, own))


def _owned(division: Division, tree: Any) -> Any:
    """The owner of each leaf of a tree that mirrors the parameters at some places."""
    divided = division.divide(tree)

    def of(kind, piece):
        if kind == SHARED:
            return Origin()
        if kind == "layers":
            return division.owned(piece, _of_layer, _OF_STACK, Origin())
        return jax.tree.map(lambda _: Origin(frozenset([kind])), piece)

    rows = zip(divided.kinds, divided.pieces, strict=True)
    return divided._replace(pieces=[of(kind, piece) for kind, piece in rows]).tree()


def _of_layer(number: int) -> Origin:
    return Origin(frozenset([f"layer {number}"]))


_OF_STACK = Origin(frozenset(["layers"]), 0)


def _message(path: Any, origin: Origin, own: Origin) -> str:
    where = "/".join(str(key_name(key)) for key in path)
    if origin.owners == own.owners:
        what = "all layers at once"
    else:
        what = " and ".join(sorted(map(str, origin.owners - own.owners)))
    return (
        f"tx needs gradients that layerwise_update never holds together: {where} depends on the gradient of"
        f" {what}, as with optax.clip_by_global_norm, for instance. Leave that rule out, or pass"
        " per_layer=True: tx then sees the gradient of one layer at a time, and clips each layer by its own"
        " norm. (optax.MultiSteps: gum_optax.projected_update averages microbatches.)"
    )
