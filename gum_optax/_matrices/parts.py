"""Splits fused kernels into their matrices, and joins the matrices again."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

from .._core.acceptance import Acceptance
from .._core.checks import check_integer
from .._core.measurements import Measurements
from .._core.trees import flat, is_masked
from .._mesh.explicit import explicit_sharding, spec_of
from .dimension_numbers import (
    Entry,
    Parts,
    ShardedDimensionNumbers,
    WeightDimensionNumbers,
    axes_of,
    dimension_numbers,
)


class _Cut:
    """How to split one fused kernel: the position of its parts along the axis, and their matrix axes."""

    def __init__(self, path: Any, shape: tuple[int, ...], parts: Parts):
        where, ndim = jax.tree_util.keystr(path), len(shape)
        (self.axis,) = axes_of(parts.axis, where, ndim)
        length = shape[self.axis]
        self.sizes = (length,) if parts.sizes is None else tuple(parts.sizes)
        self.is_one = parts.sizes is None
        self.head_dim = parts.head_dim
        for size in self.sizes:
            check_integer(f"a size of the parts of leaf {where}", size, at_least=1)
        if sum(self.sizes) != length:
            raise ValueError(
                f"the parts {self.sizes} of leaf {where} add up to {sum(self.sizes)}, but axis {self.axis} of"
                f" shape {shape} has {length}: give a size for each part of the axis."
            )
        reduction = axes_of(parts.numbers.reduction_axis, where, ndim)
        output = axes_of(parts.numbers.output_axis, where, ndim)
        if self.axis not in reduction + output:
            raise ValueError(
                f"leaf {where} is cut along axis {self.axis}, which is neither in the reduction axes"
                f" {reduction} nor in the output axes {output} of its parts: cut along one of those; an axis"
                " of blocks needs no cut."
            )
        if self.head_dim is not None:
            check_integer(f"head_dim of leaf {where}", self.head_dim, at_least=1)
            if any(size % self.head_dim for size in self.sizes):
                raise ValueError(
                    f"head_dim {self.head_dim} does not divide the parts {self.sizes} of leaf {where}, axis"
                    f" {self.axis} of shape {shape}."
                )
            # The axis becomes two axes, heads and head_dim; heads are blocks.
            reduction, output = (tuple(x + (x >= self.axis) for x in axes) for axes in (reduction, output))
        self.numbers: Entry = MuonDimensionNumbers(reduction, output)
        if isinstance(parts.numbers, ShardedDimensionNumbers):
            self.numbers = ShardedDimensionNumbers(
                reduction, output, self._sharding(parts.numbers.sharding, ndim)
            )

    def _sharding(self, whole: NamedSharding, ndim: int) -> NamedSharding:
        """The sharding of a part: that of the kernel, except for the cut axis."""
        spec = list(spec_of(whole, ndim))
        spec[self.axis : self.axis + 1] = [None] if self.head_dim is None else [None, None]
        return NamedSharding(whole.mesh, PartitionSpec(*spec))

    @property
    def count(self) -> int:
        return len(self.sizes)

    def apart(self, leaf: Float[Array, "..."]) -> Any:
        leaf = _whole_along(jnp.asarray(leaf), self.axis)
        starts = [sum(self.sizes[:i]) for i in range(self.count)]
        pieces = [
            jax.lax.slice_in_dim(leaf, start, start + size, axis=self.axis)
            for start, size in zip(starts, self.sizes, strict=True)
        ]
        if self.head_dim is not None:
            pieces = [_split(piece, self.axis, self.head_dim) for piece in pieces]
        return pieces[0] if self.is_one else tuple(pieces)

    def together(self, pieces: Sequence[Float[Array, "..."]]) -> Float[Array, "..."]:
        if self.head_dim is not None:
            pieces = [_merged(piece, self.axis) for piece in pieces]
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, self.axis)


def _whole_along(leaf: Array, axis: int) -> Array:
    """`leaf`, whole along `axis`: on a mesh of Explicit axes, no part may begin inside a device's share."""
    known = explicit_sharding(leaf)
    if known is None:
        return leaf
    spec = list(spec_of(known, leaf.ndim))
    spec[axis] = None
    return jax.sharding.reshard(leaf, PartitionSpec(*spec))


def _split(x: Array, axis: int, last: int) -> Array:
    return x.reshape(*x.shape[:axis], -1, last, *x.shape[axis + 1 :])


def _merged(x: Array, axis: int) -> Array:
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


class Apart:
    """Replaces every fused kernel of a tree by the tuple of its parts.

    Inner rules need not know about parts: a part is an ordinary leaf.
    """

    def __init__(self, spec: WeightDimensionNumbers, tree: Any):
        paths, self._treedef = jax.tree_util.tree_flatten_with_path(tree)
        entries = dimension_numbers(spec, tree)
        self._cuts = [
            _Cut(path, jnp.shape(x), entry) if isinstance(entry, Parts) else None
            for (path, x), entry in zip(paths, entries, strict=True)
        ]
        self.given = entries  # for the leaves of the tree
        self.entries: list[Entry] = []  # for the leaves of the split tree
        for cut, entry in zip(self._cuts, entries, strict=True):
            self.entries += [entry] if cut is None else [cut.numbers] * cut.count

    def apart(self, tree: Any) -> Any:
        """Split the kernels of any tree of that structure."""
        if not any(self._cuts):
            return tree
        leaves = self._treedef.flatten_up_to(tree)
        return self._treedef.unflatten(
            [x if cut is None else cut.apart(x) for cut, x in zip(self._cuts, leaves, strict=True)]
        )

    def together(self, tree: Any) -> Any:
        """Join the parts of a split tree to whole kernels."""
        if not any(self._cuts):
            return tree
        pieces = iter(jax.tree.leaves(tree))
        rows = [[next(pieces) for _ in range(1 if cut is None else cut.count)] for cut in self._cuts]
        return self._treedef.unflatten(
            [row[0] if cut is None else cut.together(row) for cut, row in zip(self._cuts, rows, strict=True)]
        )

    def _kernels(self, tree: Any) -> list[tuple[int, _Cut | None]]:
        """The index and the cut of the kernel of each leaf of a tree taken apart, masked leaves too."""
        cuts, found = iter(self._cuts), []
        for leaf_index, x in enumerate(flat(tree)):
            cut = None if is_masked(x) else next(cuts)
            found += [(leaf_index, cut)] * (1 if cut is None else cut.count)
        return found

    def leaf_indices(self, tree: Any) -> list[int]:
        """The index of the kernel of each leaf of a tree taken apart, masked leaves included."""
        return [leaf_index for leaf_index, _ in self._kernels(tree)]

    def acceptance_of_parts(self, accept: Acceptance | None, tree: Any) -> Acceptance | None:
        """`accept` of a tree, for the tree taken apart: parts accept a step if their kernel does."""
        if accept is None or accept.by_leaf is None or not any(self._cuts):
            return accept
        kernels = enumerate(leaf_index for leaf_index, _ in self._kernels(tree))
        by_leaf = accept.by_leaf
        return Acceptance(accept.all_leaves, {part: by_leaf[i] for part, i in kernels if i in by_leaf})

    def measurements_of_parts(self, measurements: Measurements, tree: Any) -> "Measurements | PartMeans":
        """`measurements` of a tree, for the tree taken apart."""
        if not any(self._cuts):
            return measurements
        kernels = self._kernels(tree)
        leaf_indices = [(i, sum(x == i for x, _ in kernels[:part])) for part, (i, _) in enumerate(kernels)]
        return PartMeans(measurements, leaf_indices, dict(kernels))


class PartMeans:
    """Means of linear functions of parts, computed from means of functions of their kernels."""

    def __init__(
        self,
        measurements: Measurements,
        leaf_indices: Sequence[tuple[int, int]],
        cuts: dict[int, _Cut | None],
    ):
        self._measurements, self._leaf_indices, self._cuts = measurements, leaf_indices, cuts
        self._measured: set[int] = set()

    def _of_kernels(self, leaf_indices: Sequence[int], f: Any) -> tuple[list[int], Any]:
        """A kernel for each part, as often as it has parts among them."""
        self._measured.update(leaf_indices)
        parts = [self._leaf_indices[leaf_index] for leaf_index in leaf_indices]

        def of_kernels(leaves):
            cuts = [self._cuts[kernel] for kernel, _ in parts]
            rows = zip(cuts, leaves, parts, strict=True)
            return f([x if cut is None else jax.tree.leaves(cut.apart(x))[i] for cut, x, (_, i) in rows])

        return [kernel for kernel, _ in parts], of_kernels

    def need_the_rest(self) -> None:
        """A kernel of which some parts are projected and others are not is averaged whole."""
        partly = {self._leaf_indices[leaf_index][0] for leaf_index in self._measured}
        rest = {kernel for i, (kernel, _) in enumerate(self._leaf_indices) if i not in self._measured}
        self._measurements.need(sorted(partly & rest))

    def mean(self, leaf_indices: Sequence[int], f: Any) -> Any:
        return self._measurements.mean(*self._of_kernels(leaf_indices, f))

    def once(self, leaf_indices: Sequence[int], make: Any) -> Any:
        def of_parts(mean_of):
            return make(lambda f: mean_of(self._of_kernels(leaf_indices, f)[1]))

        return self._measurements.once([self._leaf_indices[i][0] for i in leaf_indices], of_parts)
