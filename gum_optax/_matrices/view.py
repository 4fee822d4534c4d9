"""Views a leaf as a stack of matrices, `(*blocks, m, n)`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from .._core.checks import check_matrix_leaf
from .._core.trees import is_masked
from .._mesh.explicit import explicit_sharding, spec_of
from .dimension_numbers import Entry, Parts, ShardedDimensionNumbers, axes_of


@dataclasses.dataclass(frozen=True)
class View:
    """How to view a leaf as blocks: transpose to (batch, rows, columns), then reshape."""

    order: tuple[int, ...]  # the leaf's axes in the order batch axes, row axes, column axes
    batch: int  # the number of batch axes
    permuted: tuple[int, ...]  # the leaf's shape in that order
    shape: tuple[int, ...]  # (*batch, rows, columns)
    fan_in: int
    fan_out: int
    sharding: NamedSharding | None = None  # the sharding of the blocks, if known

    def of(self, leaf: Float[Array, "..."]) -> Float[Array, "*b m n"]:
        typed = self.sharding if explicit_sharding(leaf) is not None else None
        return jnp.reshape(leaf.transpose(self.order), self.shape, out_sharding=typed)

    def back(self, blocks: Float[Array, "*b m n"]) -> Float[Array, "..."]:
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return blocks.reshape(self.permuted).transpose(inverse)

    def block(self, leaf: Float[Array, "..."], number: Int[Array, ""]) -> Float[Array, "m n"]:
        """One block of `of(leaf)`, without computing the other blocks."""
        if math.prod(self.shape[:-2]) == 1:
            return self.of(leaf).reshape(self.shape[-2:])
        batch = self.permuted[: self.batch]
        start_of = dict(zip(self.order, jnp.unravel_index(number, batch), strict=False))
        sizes = [1 if axis in start_of else size for axis, size in enumerate(leaf.shape)]
        piece = jax.lax.dynamic_slice(leaf, [start_of.get(axis, 0) for axis in range(leaf.ndim)], sizes)
        return piece.transpose(self.order).reshape(self.shape[-2:])


def plain_view(x: Any) -> View:
    """The view of a leaf that already is `(*, m, n)`."""
    *batch, m, n = x.shape
    return View(tuple(range(x.ndim)), len(batch), tuple(x.shape), tuple(x.shape), m, n)


def views_beside(tree: Any, views: Any) -> Any:
    """The view of each leaf of `tree`, in which some leaves of the tree of `views` may be masked."""
    if views is None:
        return jax.tree.map(plain_view, tree)
    leaves = jax.tree.leaves(tree, is_leaf=is_masked)
    kept = [
        v for x, v in zip(leaves, jax.tree.leaves(views, is_leaf=is_masked), strict=True) if not is_masked(x)
    ]
    return jax.tree.structure(tree).unflatten(kept)


def view_of(path: Any, leaf: Any, entry: Entry, *, wide: bool) -> View:
    """The view of one leaf; `wide` puts the side to project first.

    The side to project is the smaller of fan-in and fan-out. If the dimension numbers have a sharding that
    shards exactly one side, the side to project is the other one; if it shards both, the larger side, because
    the devices that share it then sum coordinates of the smaller one. This depends on no size of a mesh, so
    that a state fits every mesh.

    Raises:
      ValueError: the leaf is empty or has no two matrix axes, or its dimension numbers overlap or are out of
        range.
      TypeError: the leaf is complex or integer.
    """
    check_matrix_leaf(path, leaf)
    where = jax.tree_util.keystr(path)
    assert not isinstance(entry, Parts), "kernels are split before they get views"
    if entry is None:
        raise ValueError(
            f"leaf {where} has None as its dimension numbers: it is not a matrix."
            " Give it to another rule with optax.partition, or use an optimizer's `others`."
        )
    if 0 in leaf.shape:
        raise ValueError(
            f"leaf {where} of shape {leaf.shape} is empty, which is no matrix. Give it to another rule with"
            " optax.partition, or give it None as its dimension numbers."
        )
    reduction = axes_of(entry.reduction_axis, where, leaf.ndim)
    output = axes_of(entry.output_axis, where, leaf.ndim)
    if len(set(reduction + output)) != len(reduction + output):
        raise ValueError(
            f"dimension numbers of leaf {where} overlap: reduction axes {reduction}, output axes {output}"
            f" of shape {leaf.shape}; each axis belongs to one of them, or to neither (a batch axis)."
        )
    if not reduction or not output:
        raise ValueError(
            f"dimension numbers {entry} leave leaf {where} of shape {leaf.shape} without two matrix axes;"
            " name at least one reduction axis and one output axis."
        )
    batch = tuple(axis for axis in range(leaf.ndim) if axis not in reduction + output)
    fan_in, fan_out = (math.prod(leaf.shape[axis] for axis in axes) for axes in (reduction, output))
    swapped = fan_in > fan_out
    declared = entry.sharding if isinstance(entry, ShardedDimensionNumbers) else None
    if declared is not None:
        split = [any(spec_of(declared, leaf.ndim)[axis] for axis in axes) for axes in (reduction, output)]
        if all(split):
            swapped = fan_in < fan_out
        elif any(split):
            swapped = split[0]
    rows, columns = (output, reduction) if wide and swapped else (reduction, output)
    order = batch + rows + columns
    blocks = [leaf.shape[axis] for axis in batch]
    sides = [math.prod(leaf.shape[axis] for axis in axes) for axes in (rows, columns)]
    permuted = tuple(leaf.shape[i] for i in order)
    sharding = explicit_sharding(leaf) or declared
    if sharding is not None:
        # Several axes viewed as one side take the sharding of the first of them.
        spec = spec_of(sharding, leaf.ndim)
        batch_spec = [spec[axis] for axis in batch]
        spec = PartitionSpec(*batch_spec, spec[rows[0]], spec[columns[0]])
        sharding = NamedSharding(sharding.mesh, spec)
    return View(order, len(batch), permuted, (*blocks, *sides), fan_in, fan_out, sharding)


def views_of(entries: Sequence[Entry], tree: Any, *, wide: bool) -> Any:
    """A tree of `View`s over the leaves of `tree`."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    views = [view_of(*leaf, entry, wide=wide) for leaf, entry in zip(leaves, entries, strict=True)]
    return treedef.unflatten(views)
