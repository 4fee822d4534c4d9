"""Flax's names of axes, told to the state: trainers that shard by name then shard it as it is."""

import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from ._checks import check_rule
from ._sharding import typed_state

Names = tuple[Any, ...]  # of each axis: a name, several, or None
Axis = tuple[Any, int]  # a name, and in how many parts the axis is seen

# What NNX called `out_sharding` before; it would take that, where it is still there, for the newer.
_OLD_KEYS = frozenset({"sharding", "sharding_names"})
_MOST_DEVICES = 2**31 - 1


def _is_variable(x: Any) -> bool:
    """Whether `x` is a `flax.nnx.Variable`; where Flax was not imported, nothing is."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Variable)


def _is_box(x: Any) -> bool:
    """Whether `x` holds an array and the names of its axes: NNX's variables, Linen's `Partitioned`."""
    meta = sys.modules.get("flax.core.meta")
    return _is_variable(x) or (meta is not None and isinstance(x, meta.Partitioned))


def _content(box: Any) -> Any:
    return box.get_value() if _is_variable(box) else box.value


def _written(box: Any) -> Any:
    """The names that a box has, which beside a parameter need not be those of its own array."""
    return box.get_metadata().get("out_sharding") if _is_variable(box) else box.names


def _names(box: Any) -> Names:
    """The names of a parameter's axes, one for each; none where its box does not tell them."""
    found, shape = _written(box), getattr(_content(box), "shape", None)  # a hole has no shape
    if shape is None or not found or isinstance(found, NamedSharding) or len(found) > len(shape):
        return ()
    names = list(found)
    if _is_variable(box) and len(names) < len(shape):
        # MaxText writes down apart what its scan over layers has added.
        added = box.get_metadata()
        if "param_scan_axis" in added and "partition_name" in added:
            names.insert(added["param_scan_axis"], added["partition_name"])
    return (*names, *[None] * (len(shape) - len(names)))


def _renamed(box: Any, names: Names) -> Any:
    """The box of the same array, whose axes have other names."""
    if not _is_variable(box):
        return box.replace(names=names)
    new = box.copy()
    kept = {key: value for key, value in box.get_metadata().items() if key not in _OLD_KEYS}
    new.set_metadata(kept | {"out_sharding": names})
    return new


def _boxed(array: Any, names: Names, like: Any) -> Any:
    """A box for an array that stands at no parameter's place, of the kind of another."""
    if not _is_variable(like):
        return like.replace(value=array, names=names)
    return type(like)(array, out_sharding=names, eager_sharding=False)


def _axes(box: Any) -> list[Axis | None]:
    """The named axes of a parameter, those of size one and a second of the same name left out."""
    axes: list[Axis | None] = []
    for name, size in zip(_names(box), jnp.shape(_content(box)) if _names(box) else (), strict=True):
        axis = None if name is None or size < 2 else (name, _least_factor(size))
        axes.append(None if axis in axes else axis)
    return axes


def _least_factor(size: int) -> int:
    return next(p for p in range(2, size + 1) if size % p == 0)


def _at_once(axes: list[Axis]) -> list[list[Axis]]:
    """Axes in groups whose sizes a mesh can have: JAX counts its devices in 32 bits."""
    groups: list[list[Axis]] = []
    for axis in axes:
        if not groups or math.prod(factor for _, factor in (*groups[-1], axis)) > _MOST_DEVICES:
            groups.append([])
        groups[-1].append(axis)
    return groups


def _names_beside(tx: optax.GradientTransformation, params: Any) -> list[list[Any]]:
    """The names of the axes of each array of `tx`'s state; empty where the parameters have none.

    They are carried by types, on a mesh on which nothing is: to be sharded over an axis of it is to have its
    name.
    """
    beside: list[list[Axis | None]] = []
    for box in jax.tree.leaves(params, is_leaf=_is_box):
        beside += [_axes(box) if _is_box(box) else []] * len(jax.tree.leaves(box))
    found: list[list[Any]] = []
    for group in _at_once(list(dict.fromkeys(axis for axes in beside for axis in axes if axis))):
        axis_of = {axis: f"axis{i}" for i, axis in enumerate(group)}
        name_of = {axis_of[name, factor]: name for name, factor in group}
        sizes = tuple(factor for _, factor in group)
        mesh = AbstractMesh(sizes, tuple(name_of), axis_types=(AxisType.Explicit,) * len(group))
        specs = [PartitionSpec(*(axis_of.get(axis) for axis in axes)) for axes in beside]
        state, specs = typed_state(tx, params, specs, mesh)
        rows = [
            [name_of.get(axis) for axis in (*spec, *[None] * (x.ndim - len(spec)))]
            for x, spec in zip(jax.tree.leaves(state), specs, strict=True)
        ]
        found = found or [[None] * len(row) for row in rows]
        found = [[a or b for a, b in zip(*pair, strict=True)] for pair in zip(found, rows, strict=True)]
    return found


def with_axis_names(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Name the axes of `tx`'s state as Flax names those of the parameters.

    A state leaf at a parameter's place would come with the names of the parameter's axes, though it has
    others: `(layers, rank, mlp)` beside `(embed, layers, mlp)`. Trainers that shard what they find by its
    names (Tunix, MaxText) would refuse it, or spread the wrong axis. With this, what `init` makes beside a
    parameter with its size along an axis has that axis's name, a rank has none, and what stands beside
    several parameters, the momenta of sampled blocks, is put in boxes of its own.

    The optimizers of this library do it themselves; it is for compositions of the parts. Without Flax, and
    where nothing is named, nothing is done.

    Args:
      tx: any optax transformation.

    Raises:
      TypeError: `tx` is not a transformation.
    """
    check_rule("tx", tx)
    tx = optax.with_extra_args_support(tx)

    def init(params):
        state, rows = tx.init(params), _names_beside(tx, params)
        if not rows:
            return state
        found = iter(rows)
        box = next(filter(_is_box, jax.tree.leaves(params, is_leaf=_is_box)))

        def named(x):
            names = [tuple(next(found)) for _ in jax.tree.leaves(x)]
            if len(names) != 1:
                return x  # a hole
            if _is_box(x):
                return _renamed(x, names[0]) if _written(x) else x
            return _boxed(x, names[0], box) if any(names[0]) else x

        return jax.tree.map(named, state, is_leaf=_is_box)

    def update(updates, state, params=None, **extra_args):
        outside = jax.tree.structure(state)
        if any(map(_is_box, jax.tree.leaves(state, is_leaf=_is_box))):
            # With the boxes that `tx` would have made: a box of other names is another tree.
            inside = jax.eval_shape(tx.init, updates if params is None else params)
            state = jax.tree.structure(inside).unflatten(jax.tree.leaves(state))
        steps, new = tx.update(updates, state, params, **extra_args)
        return steps, outside.unflatten(jax.tree.leaves(new))

    return optax.GradientTransformationExtraArgs(init, update)
