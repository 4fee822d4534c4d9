"""The shardings of the optimizer state on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from .._core.checks import check_rule, shown


def state_shardings(tx: optax.GradientTransformation, params: Any, param_shardings: Any) -> Any:
    """The sharding of each array of `tx`'s state, derived from the shardings of the parameters.

    A state array beside a parameter is sharded like the parameter along every axis that both share. A rank
    axis, and an array that belongs to no parameter, is whole on every device, so a rank need not be a
    multiple of a mesh axis. Pass the result to `jit`, so that `init` creates the state in its final place.

    A mesh of Explicit axes (the default of `jax.make_mesh`) does not need this function: there `init` reads
    the shardings from the types of the parameters.

    Args:
      tx: any optax transformation.
      params: the parameters, arrays or shapes.
      param_shardings: a `jax.sharding.NamedSharding` for each leaf, all on one mesh.

    Returns:
      A tree of `NamedSharding`s with the structure of `tx.init(params)`.

    Raises:
      TypeError: a sharding is not a `NamedSharding`, or `tx` is not a transformation.
      ValueError: the shardings are on several meshes, there is no sharding, they are not a tree like
        `params`, or a sharding does not fit its leaf.

    Examples:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
      >>> tx, params = gum_optax.galore_muon(1e-3, rank=2), {"kernel": jnp.ones((4, 8))}
      >>> shardings = gum_optax.state_shardings(tx, params, {"kernel": sharding})
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> tuple(optax.tree.get(state, "projectors")["kernel"].sharding.spec)
      ('data', None)
    """
    check_rule("tx", tx)
    try:
        shardings = jax.tree.structure(params).flatten_up_to(param_shardings)
    except ValueError as error:
        raise ValueError(
            "param_shardings must be a tree like params with a jax.sharding.NamedSharding for each leaf, such"
            " as jax.tree.map(lambda x: NamedSharding(mesh, spec), params), got"
            f" {shown(param_shardings)}: {error}"
        ) from None
    for sharding in shardings:
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                f"param_shardings must hold a jax.sharding.NamedSharding for each leaf, got {sharding!r};"
                " make one by NamedSharding(mesh, spec)."
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
    """The shapes of `tx`'s state, and the spec of each state array, from the specs of the parameters.

    Args:
      tx: any optax transformation.
      params: arrays or shapes.
      specs: the spec of each leaf of `params`.
      axes: the names and sizes of the mesh axes in `specs`. The mesh is abstract: it needs no devices.
    """
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes))
    leaves, treedef = jax.tree.flatten(params)
    typed = [
        jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=NamedSharding(mesh, spec))
        for x, spec in zip(leaves, specs, strict=True)
    ]
    # Set the mesh: without it, jax 0.12 gives new arrays no sharding in their types. Set the empty mesh
    # first: JAX does not let a mesh replace one of another size.
    none = AbstractMesh((), ())
    with jax.sharding.use_abstract_mesh(none), jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(tx.init, treedef.unflatten(typed))
    return state, [PartitionSpec() if x.sharding is None else x.sharding.spec for x in jax.tree.leaves(state)]


def check_processes_agree(state: optax.OptState) -> None:
    """Check that all processes hold the same keys, counts and draws.

    JAX does not notice a seed that differs between hosts: each host compiles its own program and draws its
    own blocks, and the parameters drift apart. Call this function once, after `init` or a restore. With one
    process it returns at once.

    Args:
      state: the state of any optax transformation; the check compares its integer arrays that are whole on
        every device.

    Raises:
      ValueError: an array differs; the message names the array and the value in each process.

    Examples:
      >>> state = gum_optax.gum(1e-3, rank=2).init({"kernel": jnp.ones((4, 8))})
      >>> gum_optax.check_processes_agree(state)  # no error
      >>> jax.process_count()
      1
    """
    if jax.process_count() == 1:
        return
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if not (isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.integer) and x.is_fully_replicated):
            continue
        if x.dtype.itemsize == 1:  # codes of eight bits: large, and no keys, counts or draws
            continue
        held = multihost_utils.process_allgather(x.addressable_data(0))
        if (held != held[0]).any():
            raise ValueError(
                f"{jax.tree_util.keystr(path)} differs between processes: {held.tolist()};"
                " give every process the same key and the same checkpoint."
            )
