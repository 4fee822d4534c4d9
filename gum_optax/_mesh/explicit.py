"""Leaves whose shardings are part of their types: what stands beside them, and rules on them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from .._core.acceptance import Acceptance
from .._core.context import MatrixContext


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding that is part of the type of `x`, as it is on a mesh of Explicit axes."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def spec_of(sharding: NamedSharding, ndim: int) -> tuple[Any, ...]:
    """What each of `ndim` axes is sharded over; a spec leaves out the last ones."""
    return (*sharding.spec, *[None] * (ndim - len(sharding.spec)))


def _beside(
    g: Float[Array, "*b m n"], rows: int, columns: int, blocks: int | None = None
) -> tuple[tuple[int, ...], NamedSharding | None]:
    """Shape and sharding of an array that stands beside `g`: `(*b, rows, columns)`.

    A side is an axis of `g` (-2 or -1), and is then sharded like it, or a size, and is then on every device.
    So are `blocks`, where they are given in place of those of `g`.
    """
    sides = rows, columns
    batch = g.shape[:-2] if blocks is None else (blocks,)
    shape = (*batch, *(g.shape[side] if side < 0 else side for side in sides))
    sharding = explicit_sharding(g)
    if sharding is None:
        return shape, None
    batch = sharding.spec[:-2] if blocks is None else (None,)
    spec = (*batch, *(sharding.spec[side] if side < 0 else None for side in sides))
    return shape, NamedSharding(sharding.mesh, PartitionSpec(*spec))


def zeros(
    g: Float[Array, "*b m n"], rows: int, columns: int, blocks: int | None = None
) -> Float[Array, "*c rows columns"]:
    """Float32 zeros that stand beside `g`, as `_beside` says."""
    shape, sharding = _beside(g, rows, columns, blocks)
    return jnp.zeros(shape, jnp.float32, out_sharding=sharding)


def placed(
    x: Float[Array, "*b rows columns"], g: Float[Array, "*b m n"], rows: int, columns: int
) -> Float[Array, "*b rows columns"]:
    """`x`, sharded as what stands beside `g`."""
    _, sharding = _beside(g, rows, columns)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def on_auto_axes(update: Callable[..., Any]) -> Callable[..., Any]:
    """An update whose gradients' types may carry shardings, run where XLA chooses all shardings within.

    Between them, factorizations and products of sharded matrices need no words about theirs. Steps come
    out sharded as the gradients, and state as it was.
    """

    def run(updates, state, params, context: MatrixContext, extra_args):
        shardings = [explicit_sharding(x) for x in jax.tree.leaves(updates)]
        meshes = [sharding.mesh for sharding in shardings if sharding is not None]
        if not meshes:
            return update(updates, state, params, context, extra_args)
        if context.measurements is not None:
            raise ValueError(
                f"on Explicit mesh axes, here {meshes[0].axis_names}, projected_update runs within"
                " jax.shard_map over those of the data; give the others axis_types=AxisType.Auto."
            )
        everywhere = NamedSharding(meshes[0], PartitionSpec())
        kept = []

        def inside(updates, state, params, flags, extra_args):
            inner = None if flags is None else Acceptance(*flags)
            own = dataclasses.replace(context, accept=inner)
            steps, new = update(updates, state, params, own, extra_args)
            kept.extend(inner is not None and inner.is_kept(x) for x in jax.tree.leaves(new))
            return steps, new

        out = jax.tree.map(lambda x: explicit_sharding(x) or everywhere, (updates, state))
        accept = context.accept
        flags = None if accept is None else (accept.all_leaves, accept.by_leaf)
        within = jax.sharding.auto_axes(inside, out_sharding=out)
        steps, new = within(updates, state, params, flags, extra_args)  # pyright: ignore[reportCallIssue]
        if accept is not None:
            accept.mark_kept([x for x, yes in zip(jax.tree.leaves(new), kept, strict=True) if yes])
        return steps, new

    return run
