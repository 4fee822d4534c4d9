"""The names that models give to axes, told to the state, which trainers shard by them."""

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import PartitionSpec

from .._core.checks import check_rule
from .state_shardings import typed_state

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
    told, shape = box.get_metadata(), getattr(box.get_value(), "shape", ())
    names = told.get("out_sharding")
    names = getattr(getattr(names, "sharding", names), "spec", names)  # of a Format, a NamedSharding
    scanned = all(key in told for key in _SCAN)
    if not scanned or not isinstance(names, tuple) or len(names) != len(shape) - 1:
        return names
    at = told["param_scan_axis"]
    return (*names[:at], told["partition_name"], *names[at:])


# What MaxText says of a scan, beside the names.
_SCAN = ("param_scan_axis", "partition_name")


def _variable_like(box: Any, array: Any, names: Names) -> Any:
    """A copy, without the constructor and the hooks, which are for parameters."""
    told = box.get_metadata()
    # Under its old names NNX would take `out_sharding`, where they are still there, for the newer.
    dropped = {"sharding", "sharding_names"}
    if told.get("partition_name") not in names:
        dropped.update(_SCAN)  # the layers are no axis of this array, and are not to be put in
    new = box.copy(array)
    told = {key: x for key, x in told.items() if key not in dropped}
    new.set_metadata(told | {"out_sharding": names})
    return new


def _named_array_like(box: Any, array: Any, names: Names) -> Any:
    """Haliax has no axis without a name, and no two of one."""
    free = (name for i in itertools.count() if (name := f"axis{i}") not in names)
    return type(box)(array, tuple(next(free) if name is None else name for name in names))


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


def is_box(x: Any) -> bool:
    """Whether it is a variable of NNX, a box of Linen or a named array of Haliax."""
    return _kind(x) is not None


def has_boxes(tree: Any) -> bool:
    """Whether a leaf of the tree is in one."""
    return any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box)))


def unbox(x: Any) -> tuple[Any, tuple[str | None, ...]]:
    """A box's content, and the names of its axes; none where it has not as many as axes."""
    kind = _kind(x)
    if kind is None:
        return x, ()
    content, names = kind.content(x), kind.names(x)
    is_told = isinstance(names, tuple | list | PartitionSpec)
    if not is_told or len(names) != len(getattr(content, "shape", ())):
        return content, ()
    return content, tuple(name if isinstance(name, str) else None for name in names)


def _axes(x: Any) -> list[Axis | None]:
    """The named axes of a parameter, those of size one and a second of the same name left out."""
    kind = _kind(x)
    if kind is None:
        return []
    names, shape = kind.names(x), getattr(kind.content(x), "shape", None)  # a hole has no shape
    if shape is None or not isinstance(names, tuple | list | PartitionSpec) or len(names) > len(shape):
        return []
    told = [tuple(name) if isinstance(name, list) else name for name in names]
    once = [None if name in told[:i] else name for i, name in enumerate(told)]
    pairs = zip(once, shape, strict=False)
    return [None if name is None or size < 2 else (name, _least_factor(size)) for name, size in pairs]


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
    for box in jax.tree.leaves(params, is_leaf=is_box):
        beside += [_axes(box)] * len(jax.tree.leaves(box))
    found: list[list[Any]] = []
    for group in _at_once(list(dict.fromkeys(axis for axes in beside for axis in axes if axis is not None))):
        axis_of = {axis: f"axis{i}" for i, axis in enumerate(group)}
        name_of = {axis_of[name, factor]: name for name, factor in group}
        sizes = {axis_of[name, factor]: factor for name, factor in group}
        specs = [PartitionSpec(*(axis and axis_of.get(axis) for axis in axes)) for axes in beside]
        state, specs = typed_state(tx, params, specs, sizes)
        rows = [
            [name_of.get(axis) for axis in (*spec, *[None] * (x.ndim - len(spec)))]
            for x, spec in zip(jax.tree.leaves(state), specs, strict=True)
        ]
        found = found or [[None] * len(row) for row in rows]
        found = [[a or b for a, b in zip(*pair, strict=True)] for pair in zip(found, rows, strict=True)]
    return found


def _boxes_of_parts(x: Any) -> Any:
    """Of a box that holds the parts of a kernel, a box for each: libraries want an array in every one."""
    kind = _kind(x)
    if kind is None or type(kind.content(x)) is not tuple:  # a hole is one as well
        return x
    return tuple(
        jax.tree.unflatten(jax.tree.structure(x, is_leaf=lambda y: y is not x), [part])
        for part in kind.content(x)
    )


def with_axis_names(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Name the axes of `tx`'s state as Flax or Haliax names those of the parameters.

    A state leaf at a parameter's place would come with the names of the parameter's axes, though it has
    others: `(layers, rank, mlp)` beside `(embed, layers, mlp)`. Trainers that shard what they find by its
    names (Tunix, MaxText, Levanter) would refuse it, or spread the wrong axis. With this, what `init` makes
    beside a parameter with its size along an axis (more than one) has that axis's name, a rank has none, and
    what stands beside several parameters, the momenta of sampled blocks, is put in boxes of its own.

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
            return jax.tree.map(_boxes_of_parts, state, is_leaf=is_box)
        found = iter(rows)
        boxes = ((x, _kind(x)) for x in jax.tree.leaves(params, is_leaf=is_box))
        first, its_kind = next((box, kind) for box, kind in boxes if kind is not None)

        def named(x):
            names = [tuple(next(found)) for _ in jax.tree.leaves(x)]
            kind = _kind(x)
            if kind is None:
                return its_kind.like(first, x, names[0]) if names and any(names[0]) else x
            if not names:
                # A hole, without its box: whoever looks for what the names say would look for an array.
                return kind.content(x)
            parts = _boxes_of_parts(x)
            if not kind.names(x):
                return parts
            if parts is not x:
                return tuple(kind.like(x, kind.content(y), own) for y, own in zip(parts, names, strict=True))
            return kind.like(x, kind.content(x), names[0])

        return jax.tree.map(named, state, is_leaf=is_box)

    def update(updates, state, params=None, **extra_args):
        outside, like = jax.tree.structure(state), updates if params is None else params
        if has_boxes(like):
            # With the boxes that `tx` would have made: a box of other names, or none, is another tree.
            inside = jax.eval_shape(tx.init, like)
            state = jax.tree.structure(inside).unflatten(jax.tree.leaves(state))
        steps, new = tx.update(updates, state, params, **extra_args)
        return steps, outside.unflatten(jax.tree.leaves(new))

    return optax.GradientTransformationExtraArgs(init, update)
