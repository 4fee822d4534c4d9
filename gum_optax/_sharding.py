"""Where state lives on a mesh; and rules on leaves whose shardings are part of their types."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ._checks import check_rule
from ._guard import Guard


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding that is part of the type of `x`, as it is on a mesh of Explicit axes."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


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

    def run(updates, state, params=None, *, guard: Guard | None = None, **extra_args):
        shardings = [explicit_sharding(x) for x in jax.tree.leaves(updates)]
        meshes = [sharding.mesh for sharding in shardings if sharding is not None]
        if not meshes:
            return update(updates, state, params, guard=guard, **extra_args)
        if "sketches" in extra_args:
            raise ValueError(
                f"on Explicit mesh axes, here {meshes[0].axis_names}, projected_update runs within"
                " jax.shard_map over those of the data; give the others axis_types=AxisType.Auto."
            )
        everywhere = NamedSharding(meshes[0], PartitionSpec())
        kept = []

        def inside(updates, state, params, accepted, extra_args):
            inner = None if accepted is None else Guard(*accepted)
            steps, new = update(updates, state, params, guard=inner, **extra_args)
            kept.extend(inner is not None and inner.has(x) for x in jax.tree.leaves(new))
            return steps, new

        out = jax.tree.map(lambda x: explicit_sharding(x) or everywhere, (updates, state))
        accepted = None if guard is None else (guard.taken, guard.leaves)
        within = jax.sharding.auto_axes(inside, out_sharding=out)
        steps, new = within(updates, state, params, accepted, extra_args)  # pyright: ignore[reportCallIssue]
        if guard is not None:
            guard.as_kept([x for x, yes in zip(jax.tree.leaves(new), kept, strict=True) if yes])
        return steps, new

    return run


def state_shardings(tx: optax.GradientTransformation, params: Any, param_shardings: Any) -> Any:
    """The sharding of each array of `tx`'s state, from those of the parameters.

    What `init` makes beside a parameter, with its size along an axis, is sharded as that axis; a rank, and
    what belongs to no parameter, is on every device. So a rank need not be a multiple of a mesh axis. Give it
    to `jit`, that state is born where it lives:

        shardings = state_shardings(tx, params, param_shardings)
        state = jax.jit(tx.init, out_shardings=shardings)(params)

    On a mesh of Explicit axes (the default of `jax.make_mesh`) the types of the parameters tell `init` as
    much, and this is not needed.

    Args:
      tx: any optax transformation.
      params: the parameters, arrays or shapes.
      param_shardings: a `jax.sharding.NamedSharding` for each leaf, all of one mesh.

    Returns:
      A tree of `NamedSharding`s like `tx.init(params)`.

    Raises:
      TypeError: a sharding is not a `NamedSharding`, or `tx` is not a transformation.
      ValueError: the shardings are of several meshes, there is none, or one does not fit its leaf.
    """
    check_rule("tx", tx)
    shardings = jax.tree.structure(params).flatten_up_to(param_shardings)
    for sharding in shardings:
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                f"param_shardings must hold a jax.sharding.NamedSharding for each leaf, got {sharding!r}."
            )
    meshes = list(dict.fromkeys(sharding.mesh for sharding in shardings))
    if len(meshes) != 1:
        raise ValueError(f"param_shardings must be of one mesh, got {len(meshes)} meshes: {meshes}.")
    mesh = meshes[0]
    state, specs = typed_state(tx, params, [sharding.spec for sharding in shardings], dict(mesh.shape))
    return jax.tree.structure(state).unflatten([NamedSharding(mesh, spec) for spec in specs])


def typed_state(
    tx: optax.GradientTransformation, params: Any, specs: list[PartitionSpec], axes: dict[str, int]
) -> tuple[Any, list[PartitionSpec]]:
    """The shapes of `tx`'s state, and what each has of the axes that the parameters' types tell.

    Args:
      tx: any optax transformation.
      params: arrays or shapes.
      specs: of each of their leaves.
      axes: the mesh axes that the specs speak of, and their sizes; there need be no such devices.
    """
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes))
    leaves, treedef = jax.tree.flatten(params)
    typed = [
        jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=NamedSharding(mesh, spec))
        for x, spec in zip(leaves, specs, strict=True)
    ]
    # Within the mesh, without which jax 0.12 types no array that has just been made; from none to it, since
    # JAX lets no other size take the place of one that is in force.
    none = AbstractMesh((), ())
    with jax.sharding.use_abstract_mesh(none), jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(tx.init, treedef.unflatten(typed))
    return state, [PartitionSpec() if x.sharding is None else x.sharding.spec for x in jax.tree.leaves(state)]


def check_processes_agree(state: Any) -> None:
    """Compare what every process must hold alike: the keys, counts and draws of a state that has just begun.

    Nothing in JAX notices a seed that differs between hosts: each compiles its own program, draws its own
    blocks, and the parameters drift apart. Call it once, after `init` or a restore. One process has no other.

    Args:
      state: of any optax transformation; its arrays of integers that are whole on every device are compared.

    Raises:
      ValueError: they differ; the message names the array and what each process holds.
    """
    if jax.process_count() == 1:
        return
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if not (isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.integer) and x.is_fully_replicated):
            continue
        held = multihost_utils.process_allgather(x.addressable_data(0))
        if (held != held[0]).any():
            raise ValueError(
                f"{jax.tree_util.keystr(path)} differs between processes: {held.tolist()};"
                " give every process the same key and the same checkpoint."
            )
