"""Splits fused kernels into their matrices, and joins the matrices again."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

from .._core.checks import check_integer
from .._core.guard import Guard
from .._core.measurements import Sketches
from .._core.trees import flat, is_hole
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
        """The index and cut of the kernel behind each leaf of the split tree, masked leaves included."""
        cuts, kernels = iter(self._cuts), []
        for place, x in enumerate(flat(tree)):
            cut = None if is_hole(x) else next(cuts)
            kernels += [(place, cut)] * (1 if cut is None else cut.count)
        return kernels

    def guarded(self, guard: Guard | None, tree: Any) -> Guard | None:
        """`guard` of a tree, for the split tree: a part steps if its kernel does."""
        if guard is None or guard.leaves is None or not any(self._cuts):
            return guard
        kernels = enumerate(place for place, _ in self._kernels(tree))
        return Guard(
            guard.taken, {part: guard.leaves[place] for part, place in kernels if place in guard.leaves}
        )

    def measured(self, sketches: Sketches, tree: Any) -> "Sketches | PartMeans":
        """`sketches` of a tree, for functions of the parts."""
        if not any(self._cuts):
            return sketches
        kernels = self._kernels(tree)
        places = [(place, sum(x == place for x, _ in kernels[:i])) for i, (place, _) in enumerate(kernels)]
        return PartMeans(sketches, places, dict(kernels))


class PartMeans:
    """Means of linear functions of parts, computed from means of functions of their kernels."""

    def __init__(self, sketches: Sketches, places: Sequence[tuple[int, int]], cuts: dict[int, _Cut | None]):
        self._sketches, self._places, self._cuts = sketches, places, cuts
        self._asked: set[int] = set()

    def _of_kernels(self, places: Sequence[int], f: Any) -> tuple[list[int], Any]:
        """The kernel of each part, and `f` as a function of these kernels; a kernel may occur repeatedly."""
        self._asked.update(places)
        parts = [self._places[place] for place in places]

        def of_kernels(leaves):
            cuts = [self._cuts[kernel] for kernel, _ in parts]
            rows = zip(cuts, leaves, parts, strict=True)
            return f([x if cut is None else jax.tree.leaves(cut.apart(x))[i] for cut, x, (_, i) in rows])

        return [kernel for kernel, _ in parts], of_kernels

    def need_the_rest(self) -> None:
        """Request the whole mean of every kernel that has both projected and other parts."""
        partly = {self._places[place][0] for place in self._asked}
        rest = {kernel for place, (kernel, _) in enumerate(self._places) if place not in self._asked}
        self._sketches.need(sorted(partly & rest))

    def mean(self, places: Sequence[int], f: Any) -> Any:
        return self._sketches.mean(*self._of_kernels(places, f))

    def once(self, places: Sequence[int], make: Any) -> Any:
        def of_parts(mean_of):
            return make(lambda f: mean_of(self._of_kernels(places, f)[1]))

        return self._sketches.once([self._places[place][0] for place in places], of_parts)
