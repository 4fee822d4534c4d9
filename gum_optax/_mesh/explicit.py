"""Leaves whose shardings are part of their types (Explicit mesh axes): state beside them, and updates."""

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
    """The sharding in the type of `x`, which is there on a mesh of Explicit axes."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def whole(x: Any) -> Any:
    """`x` whole on every device, if its type says that it is sharded."""
    sharding = explicit_sharding(x)
    return x if sharding is None else jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def spec_of(sharding: NamedSharding, ndim: int) -> tuple[Any, ...]:
    """The mesh axes that shard each of `ndim` axes; a spec may omit its last entries."""
    return (*sharding.spec, *[None] * (ndim - len(sharding.spec)))


def _beside(
    g: Float[Array, "*b m n"], rows: int, columns: int, blocks: int | None = None
) -> tuple[tuple[int, ...], NamedSharding | None]:
    """Shape and sharding of an array beside `g`: `(*b, rows, columns)`.

    A negative side is an axis of `g` (-2 or -1) and is sharded like that axis. A positive side is a size and
    is whole on every device. `blocks`, if given, replaces the batch axes of `g` and is whole on every device.
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
    """Float32 zeros beside `g`, with the shape and sharding of `_beside`."""
    shape, sharding = _beside(g, rows, columns, blocks)
    return jnp.zeros(shape, jnp.float32, out_sharding=sharding)


def placed(
    x: Float[Array, "*b rows columns"], g: Float[Array, "*b m n"], rows: int, columns: int
) -> Float[Array, "*b rows columns"]:
    """`x`, resharded as an array beside `g`."""
    _, sharding = _beside(g, rows, columns)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def on_auto_axes(update: Callable[..., Any]) -> Callable[..., Any]:
    """Run an update on Auto mesh axes, even if the types of the gradients carry shardings.

    XLA then chooses the shardings of factorizations and products inside the update. Steps come out with the
    shardings of the gradients, and the state keeps its own.
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
        was_kept = []

        def inside(updates, state, params, flags, extra_args):
            inner = None if flags is None else Acceptance(*flags)
            own = dataclasses.replace(context, accept=inner)
            steps, new = update(updates, state, params, own, extra_args)
            was_kept.extend(inner is not None and inner.is_kept(x) for x in jax.tree.leaves(new))
            return steps, new

        out = jax.tree.map(lambda x: explicit_sharding(x) or everywhere, (updates, state))
        accept = context.accept
        flags = None if accept is None else (accept.all_leaves, accept.by_leaf)
        within = jax.sharding.auto_axes(inside, out_sharding=out)
        steps, new = within(updates, state, params, flags, extra_args)  # pyright: ignore[reportCallIssue]
        if accept is not None:
            accept.mark_kept([x for x, yes in zip(jax.tree.leaves(new), was_kept, strict=True) if yes])
        return steps, new

    return run
