"""Copies the models' axis names onto the optimizer state, because some trainers shard by name."""

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import PartitionSpec

from .._core.checks import check_rule
from .._core.context import NO_CONTEXT, MatrixContext
from .state_shardings import typed_state

Names = tuple[Any, ...]  # for each axis: a name, several names, or None
Axis = tuple[Any, int]  # a name, and the number of parts of the axis on the abstract mesh

_MOST_DEVICES = 2**31 - 1


class _Kind(NamedTuple):
    """A kind of box: a node of a tree that holds one array and the names of its axes."""

    content: Callable[[Any], Any]
    names: Callable[[Any], Any]
    # Makes a box from another box, an array and names.
    like: Callable[[Any, Any, Names], Any]


def _variable_names(box: Any) -> Any:
    """The axis names of an NNX variable. MaxText stores the axis of its scan over layers separately."""
    metadata, shape = box.get_metadata(), getattr(box.get_value(), "shape", ())
    names = metadata.get("out_sharding")
    names = getattr(
        getattr(names, "sharding", names), "spec", names
    )  # a Format or a NamedSharding has a spec
    scanned = all(key in metadata for key in _SCAN)
    if not scanned or not isinstance(names, tuple) or len(names) != len(shape) - 1:
        return names
    scan_axis = metadata["param_scan_axis"]
    return (*names[:scan_axis], metadata["partition_name"], *names[scan_axis:])


# The metadata of MaxText's scan, beside the names.
_SCAN = ("param_scan_axis", "partition_name")


def _variable_like(box: Any, array: Any, names: Names) -> Any:
    """Copy an NNX variable without its constructor and hooks, which are for parameters."""
    metadata = box.get_metadata()
    # Drop the old names of `out_sharding`: NNX would prefer them to the new one.
    dropped = {"sharding", "sharding_names"}
    if metadata.get("partition_name") not in names:
        dropped.update(_SCAN)  # this array has no axis of layers, so MaxText must not insert one
    new = box.copy(array)
    metadata = {key: x for key, x in metadata.items() if key not in dropped}
    new.set_metadata(metadata | {"out_sharding": names})
    return new


def _named_array_like(box: Any, array: Any, names: Names) -> Any:
    """A Haliax array, which needs a name for every axis, and no name twice."""
    free = (name for i in itertools.count() if (name := f"axis{i}") not in names)
    return type(box)(array, tuple(next(free) if name is None else name for name in names))


_VARIABLE = _Kind(lambda box: box.get_value(), _variable_names, _variable_like)
_PARTITIONED = _Kind(
    lambda box: box.value, lambda box: box.names, lambda box, x, names: box.replace(value=x, names=names)
)
_NAMED_ARRAY = _Kind(lambda box: box.array, lambda box: box.axis_names, _named_array_like)
# By module and class. `sys.modules` tells which libraries are imported, so that none is a dependency.
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
    """Whether `x` is a variable of NNX, a box of Linen or a named array of Haliax."""
    return _kind(x) is not None


def has_boxes(tree: Any) -> bool:
    """Whether some leaf of the tree is in a box."""
    return any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box)))


def unbox(x: Any) -> tuple[Any, tuple[str | None, ...]]:
    """The content of a box and its axis names; no names unless there is one for each axis."""
    kind = _kind(x)
    if kind is None:
        return x, ()
    content, names = kind.content(x), kind.names(x)
    has_names = isinstance(names, tuple | list | PartitionSpec)
    if not has_names or len(names) != len(getattr(content, "shape", ())):
        return content, ()
    return content, tuple(name if isinstance(name, str) else None for name in names)


def _axes(x: Any) -> list[Axis | None]:
    """The named axes of a parameter, except axes of size one and the second axis of a repeated name."""
    kind = _kind(x)
    if kind is None:
        return []
    names, shape = kind.names(x), getattr(kind.content(x), "shape", None)  # a masked leaf has no shape
    if shape is None or not isinstance(names, tuple | list | PartitionSpec) or len(names) > len(shape):
        return []
    hashable = [tuple(name) if isinstance(name, list) else name for name in names]
    unique = [None if name in hashable[:i] else name for i, name in enumerate(hashable)]
    pairs = zip(unique, shape, strict=False)
    return [None if name is None or size < 2 else (name, _least_factor(size)) for name, size in pairs]


def _least_factor(size: int) -> int:
    return next(p for p in range(2, size + 1) if size % p == 0)


def _fitting_one_mesh(axes: list[Axis]) -> list[list[Axis]]:
    """Divide the axes into groups that fit one mesh each: JAX counts the devices of a mesh in 32 bits."""
    groups: list[list[Axis]] = []
    for axis in axes:
        if not groups or math.prod(factor for _, factor in (*groups[-1], axis)) > _MOST_DEVICES:
            groups.append([])
        groups[-1].append(axis)
    return groups


def _names_beside(tx: optax.GradientTransformation, params: Any) -> list[list[Any]]:
    """The axis names of each array of `tx`'s state; empty if no parameter axis has a name.

    The function traces `init` on an abstract mesh with one axis per name. A dimension that comes out sharded
    over a mesh axis gets the name of that axis.
    """
    beside: list[list[Axis | None]] = []
    for box in jax.tree.leaves(params, is_leaf=is_box):
        beside += [_axes(box)] * len(jax.tree.leaves(box))
    named_axes = list(dict.fromkeys(axis for axes in beside for axis in axes if axis is not None))
    state_names: list[list[Any]] = []
    for group in _fitting_one_mesh(named_axes):
        axis_of = {axis: f"axis{i}" for i, axis in enumerate(group)}
        name_of = {axis_of[name, factor]: name for name, factor in group}
        sizes = {axis_of[name, factor]: factor for name, factor in group}
        specs = [PartitionSpec(*(axis and axis_of.get(axis) for axis in axes)) for axes in beside]
        state, specs = typed_state(tx, params, specs, sizes)
        rows = [
            [name_of.get(axis) for axis in (*spec, *[None] * (x.ndim - len(spec)))]
            for x, spec in zip(jax.tree.leaves(state), specs, strict=True)
        ]
        state_names = state_names or [[None] * len(row) for row in rows]
        pairs = zip(state_names, rows, strict=True)
        state_names = [[a or b for a, b in zip(*pair, strict=True)] for pair in pairs]
    return state_names


def _boxes_of_parts(x: Any) -> Any:
    """Split a box with the parts of a kernel into one box per part: libraries expect one array per box."""
    kind = _kind(x)
    if kind is None or type(kind.content(x)) is not tuple:  # the exact type: a `MaskedNode` is a tuple too
        return x
    return tuple(
        jax.tree.unflatten(jax.tree.structure(x, is_leaf=lambda y: y is not x), [part])
        for part in kind.content(x)
    )


def with_axis_names(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Give the axes of `tx`'s state the names that Flax or Haliax gives the axes of the parameters.

    Without this, a state leaf at a parameter's place would have the names of the parameter's axes although
    its own axes differ: `(layers, rank, mlp)` beside `(embed, layers, mlp)`. Trainers that shard by axis name
    (Tunix, MaxText, Levanter) would refuse such a leaf or shard the wrong axis. With this, a state axis gets
    the name of the parameter axis that it shares (if its size is more than one), and a rank axis gets no
    name. An array beside several parameters, such as the momenta of sampled blocks, gets a box of its own.

    The optimizers of this library already do this; it is for your own compositions of the parts. If no axis
    has a name, it changes nothing.

    Args:
      tx: any optax transformation.

    Raises:
      TypeError: `tx` is not a transformation.

    Examples:
      >>> from flax.core.meta import Partitioned
      >>> params = {"kernel": Partitioned(jnp.ones((8, 4)), ("mlp", "embed"))}
      >>> tx = gum_optax.with_axis_names(gum_optax.as_matrices(gum_optax.low_rank(optax.trace(0.9), 2, 200)))
      >>> tx.init(params).low.trace["kernel"].names
      (None, 'mlp')
    """
    check_rule("tx", tx)
    tx = optax.with_extra_args_support(tx)

    def init(params):
        state, rows = tx.init(params), _names_beside(tx, params)
        if not rows:
            return jax.tree.map(_boxes_of_parts, state, is_leaf=is_box)
        remaining = iter(rows)
        boxes = ((x, _kind(x)) for x in jax.tree.leaves(params, is_leaf=is_box))
        first, first_kind = next((box, kind) for box, kind in boxes if kind is not None)

        def named(x):
            names = [tuple(next(remaining)) for _ in jax.tree.leaves(x)]
            kind = _kind(x)
            if kind is None:
                return first_kind.like(first, x, names[0]) if names and any(names[0]) else x
            if not names:
                # Unbox a masked leaf: code that reads the names of a box expects an array in it.
                return kind.content(x)
            parts = _boxes_of_parts(x)
            if not kind.names(x):
                return parts
            if parts is not x:
                return tuple(kind.like(x, kind.content(y), own) for y, own in zip(parts, names, strict=True))
            return kind.like(x, kind.content(x), names[0])

        return jax.tree.map(named, state, is_leaf=is_box)

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        outside, like = jax.tree.structure(state), updates if params is None else params
        if has_boxes(like):
            # Give `tx` the boxes that its own `init` makes: a box with other names is another tree structure.
            inside = jax.tree.structure(jax.eval_shape(tx.init, context.turn.whole(like)))
            # In the turn of one of several separate layers the state is of that layer, in its own boxes.
            if inside.num_leaves == outside.num_leaves:
                state = inside.unflatten(jax.tree.leaves(state))
        steps, new = tx.update(updates, state, params, context=context, **extra_args)
        return steps, outside.unflatten(jax.tree.leaves(new))

    return optax.GradientTransformationExtraArgs(init, update)
