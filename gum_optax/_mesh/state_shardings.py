"""Where state lives on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from .._core.checks import check_rule


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
