"""The names that models give to axes, told to the state, which trainers shard by them."""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from ._checks import check_rule
from ._sharding import typed_state

Names = tuple[Any, ...]  # of each axis: a name, several, or None
Axis = tuple[Any, int]  # a name, and in how many parts the axis is seen

_MOST_DEVICES = 2**31 - 1


class _Kind(NamedTuple):
    """A kind of box: a node of a tree that holds one array and the names of its axes."""

    content: Callable[[Any], Any]
    names: Callable[[Any], Any]
    # A box like another, of an array and names.
    like: Callable[[Any, Any, Names], Any]


def _variable_names(box: Any) -> Any:
    """Those of an NNX variable; MaxText writes down apart what its scan over layers has added."""
    told = box.get_metadata()
    names, shape = told.get("out_sharding"), getattr(box.get_value(), "shape", ())
    scanned = "param_scan_axis" in told and "partition_name" in told
    if not scanned or not isinstance(names, tuple) or len(names) != len(shape) - 1:
        return names
    at = told["param_scan_axis"]
    return (*names[:at], told["partition_name"], *names[at:])


def _variable_like(box: Any, array: Any, names: Names) -> Any:
    # Under its old names NNX would take `out_sharding`, where they are still there, for the newer.
    told = {key: x for key, x in box.get_metadata().items() if key not in ("sharding", "sharding_names")}
    return type(box)(array, **told | {"out_sharding": names, "eager_sharding": False})


def _named_array_like(box: Any, array: Any, names: Names) -> Any:
    """Haliax has no axis without a name, and no two of one."""
    return type(box)(array, tuple(f"axis{i}" if name is None else name for i, name in enumerate(names)))


_VARIABLE = _Kind(lambda box: box.get_value(), _variable_names, _variable_like)
_PARTITIONED = _Kind(
    lambda box: box.value, lambda box: box.names, lambda box, x, names: box.replace(value=x, names=names)
)
_NAMED_ARRAY = _Kind(lambda box: box.array, lambda box: box.axis_names, _named_array_like)
# Found where they are imported, so that none of them need be: module, class.
_KINDS = {
    ("flax.nnx", "Variable"): _VARIABLE,
    ("flax.core.meta", "Partitioned"): _PARTITIONED,
    ("haliax", "NamedArray"): _NAMED_ARRAY,
}


def _kind(x: Any) -> _Kind | None:
    for (module, name), kind in _KINDS.items():
        if module in sys.modules and isinstance(x, getattr(sys.modules[module], name)):
            return kind
    return None


def _is_box(x: Any) -> bool:
    return _kind(x) is not None


def _axes(x: Any) -> list[Axis | None]:
    """The named axes of a parameter, those of size one and a second of the same name left out."""
    kind = _kind(x)
    if kind is None:
        return []
    names, shape = kind.names(x), getattr(kind.content(x), "shape", None)  # a hole has no shape
    if shape is None or not names or isinstance(names, NamedSharding) or len(names) > len(shape):
        return []
    axes: list[Axis | None] = []
    for name, size in zip(names, shape, strict=False):
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
        beside += [_axes(box)] * len(jax.tree.leaves(box))
    found: list[list[Any]] = []
    for group in _at_once(list(dict.fromkeys(axis for axes in beside for axis in axes if axis is not None))):
        axis_of = {axis: f"axis{i}" for i, axis in enumerate(group)}
        name_of = {axis_of[name, factor]: name for name, factor in group}
        sizes = tuple(factor for _, factor in group)
        mesh = AbstractMesh(sizes, tuple(name_of), axis_types=(AxisType.Explicit,) * len(group))
        specs = [PartitionSpec(*(axis and axis_of.get(axis) for axis in axes)) for axes in beside]
        state, specs = typed_state(tx, params, specs, mesh)
        rows = [
            [name_of.get(axis) for axis in (*spec, *[None] * (x.ndim - len(spec)))]
            for x, spec in zip(jax.tree.leaves(state), specs, strict=True)
        ]
        found = found or [[None] * len(row) for row in rows]
        found = [[a or b for a, b in zip(*pair, strict=True)] for pair in zip(found, rows, strict=True)]
    return found


def with_axis_names(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Name the axes of `tx`'s state as Flax or Haliax names those of the parameters.

    A state leaf at a parameter's place would come with the names of the parameter's axes, though it has
    others: `(layers, rank, mlp)` beside `(embed, layers, mlp)`. Trainers that shard what they find by its
    names (Tunix, MaxText, Levanter) would refuse it, or spread the wrong axis. With this, what `init` makes
    beside a parameter with its size along an axis has that axis's name, a rank has none, and what stands
    beside several parameters, the momenta of sampled blocks, is put in boxes of its own.

    The optimizers of this library do it themselves; it is for compositions of the parts. Where nothing is
    named, nothing is done.

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
        boxes = ((x, _kind(x)) for x in jax.tree.leaves(params, is_leaf=_is_box))
        first, its_kind = next((box, kind) for box, kind in boxes if kind is not None)

        def named(x):
            names = [tuple(next(found)) for _ in jax.tree.leaves(x)]
            kind = _kind(x)
            if len(names) != 1:
                # A hole, without its box: whoever looks for what the names say would look for an array.
                return x if kind is None or names else kind.content(x)
            if kind is not None:
                return kind.like(x, kind.content(x), names[0]) if kind.names(x) else x
            return its_kind.like(first, x, names[0]) if any(names[0]) else x

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
