"""Dimension numbers: which axes of a leaf are its fan-in, its fan-out, and a batch of blocks."""

import dataclasses
import fnmatch
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers

from ._axis_names import is_box
from ._checks import check_matrix_leaf, is_function
from ._sharding import explicit_sharding
from ._trees import is_hole

# Roles of a leaf, alone or in a stack. The last two axes, fan-in before fan-out: a Flax kernel.
LAST_TWO = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
# A linear layer of PyTorch and Equinox, `(out, in)`.
OUT_IN = MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
# Attention with heads on an axis of their own: `(embed, heads, head_dim)` and `(heads, head_dim, embed)`.
SPLIT_HEADS_INPUT = MuonDimensionNumbers(reduction_axis=-3, output_axis=(-2, -1))
SPLIT_HEADS_OUTPUT = MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=-1)
# Convolutions of two dimensions: Flax's `(height, width, in, out)`, and `(out, in, height, width)`.
CONV_HWIO = MuonDimensionNumbers(reduction_axis=(-4, -3, -2), output_axis=-1)
CONV_OIHW = MuonDimensionNumbers(reduction_axis=(-3, -2, -1), output_axis=-4)

WeightDimensionNumbers = MuonDimensionNumbers | Any | Callable[[Any], Any] | None


class ShardedDimensionNumbers(NamedTuple):
    """`optax.contrib.MuonDimensionNumbers` of a leaf whose sharding is known: what `with_shardings` gives."""

    reduction_axis: Any
    output_axis: Any
    sharding: NamedSharding  # of the leaf


class Parts(NamedTuple):
    """Several matrices in one kernel, side by side along an axis: each is orthogonalized and projected by
    itself.

    | kernel | value |
    |---|---|
    | queries, keys and values `(d, 3 h)` | `Parts((h, h, h))` |
    | grouped queries `(d, q + 2 kv)` | `Parts((q, kv, kv))` |
    | gate and up `(d, 2 f)` of PyTorch, `(2 f, d)` | `Parts((f, f), axis=-2, numbers=OUT_IN)` |
    | each head of `(d, heads · head_dim)` for itself | `Parts(head_dim=head_dim)` |
    | each head of grouped queries | `Parts((q, kv, kv), head_dim=head_dim)` |
    | latent attention `(rank, heads, k + v)` | `Parts((k, v), numbers=SPLIT_HEADS_INPUT)` |

    An axis of its own needs no parts: of `(d, 3, heads, head_dim)` each is a block by
    `MuonDimensionNumbers(-4, (-2, -1))`, and each head of each by `MuonDimensionNumbers(-4, -1)`.

    State is a tuple at the kernel's place, an entry a part; a single array where `sizes` is `None`.
    """

    sizes: tuple[int, ...] | None = None  # of the parts along the axis; None: it is one part
    axis: int = -1
    head_dim: int | None = None  # cuts each part once more, into matrices of this width
    numbers: MuonDimensionNumbers | ShardedDimensionNumbers = (
        LAST_TWO  # of a part, which has the axes of the kernel
    )


Entry = MuonDimensionNumbers | ShardedDimensionNumbers | Parts | None


def _is_entry(x: Any) -> bool:
    return isinstance(x, Entry)


def unboxed(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A tree path without the `.value` in which an NNX variable or a Linen box shows its leaf."""
    boxed = bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return path[:-1] if boxed else path


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names along a tree path, the same for dicts, dataclasses and Flax NNX states.

    An NNX variable shows its leaf as `.value` in `init` and without it in `update`.
    """
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in unboxed(path))


def is_patterns(spec: Any, tree: Any) -> bool:
    """Whether it maps patterns of paths to roles, and is no tree of dimension numbers like `tree`."""
    if not isinstance(spec, dict) or not all(isinstance(x, str) for x in spec):
        return False
    flat = set(leaf_names(tree))
    return all(map(_is_entry, spec.values())) and not all((name,) in flat for name in spec)


def matching(patterns: dict[str, Entry], name: str) -> str | None:
    """The first pattern that a path matches; `*` stands for anything, slashes included."""
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def _last_two_of_all(tree: Any) -> list[Entry]:
    return [LAST_TWO] * len(jax.tree.leaves(tree))


def leaf_names(tree: Any) -> list[tuple[str, ...]]:
    """The names along the path of each leaf, without those of the box that it is in."""
    boxes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
    return [names_of(path) for path, box in boxes for _ in jax.tree.leaves(box)]


def dimension_numbers(
    spec: WeightDimensionNumbers, tree: Any, default: Callable[[Any], list[Entry]] = _last_two_of_all
) -> list[Entry]:
    """The dimension numbers of each leaf of `tree`, in the order of its leaves.

    Args:
      spec: one `MuonDimensionNumbers` or `Parts` for every leaf; a tree of them, `None` where a leaf is not a
        matrix; a function from the tree to such a tree; a mapping from patterns of paths to them, of which
        the first that matches decides; or `None`.
      tree: of arrays.
      default: from the tree to the dimension numbers of leaves that `spec` leaves open.

    Raises:
      ValueError: a leaf has no entry in the tree.
      TypeError: an entry is neither dimension numbers nor `None`.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    if not paths or spec is None:
        return default(tree) if paths else []
    if is_function(spec):
        spec = spec(tree)  # pyright: ignore[reportCallIssue]
    if isinstance(spec, MuonDimensionNumbers | Parts):
        return [spec] * len(paths)
    if isinstance(spec, dict) and is_patterns(spec, tree):
        found = [matching(spec, "/".join(names)) for names in leaf_names(tree)]
        others = default(tree) if None in found else [None] * len(found)
        return [other if at is None else spec[at] for at, other in zip(found, others, strict=True)]
    entries = jax.tree_util.tree_leaves_with_path(spec, is_leaf=_is_entry)
    table = {names_of(path): entry for path, entry in entries}
    return [_entry_at(path, table) for path in paths]


def _entry_at(path: Any, table: dict[tuple[str, ...], Any]) -> Entry:
    where = jax.tree_util.keystr(path)
    if names_of(path) not in table:
        raise ValueError(
            f"weight_dimension_numbers has no entry for leaf {where};"
            " give it MuonDimensionNumbers, or None if it is not a matrix."
        )
    entry = table[names_of(path)]
    if not _is_entry(entry):
        raise TypeError(
            f"weight_dimension_numbers of leaf {where} must be optax.contrib.MuonDimensionNumbers or None,"
            f" or gum_optax.Parts of a fused kernel, got {entry!r}."
        )
    return entry


def axes_of(axes: Any, where: str, ndim: int) -> tuple[int, ...]:
    """Non-negative axes from one axis or several."""
    given = axes if isinstance(axes, tuple | list) else (axes,)
    if not all(isinstance(axis, numbers.Integral) and not isinstance(axis, bool) for axis in given):
        raise TypeError(
            f"dimension numbers of leaf {where} must be an axis or a tuple of axes, got {axes!r};"
            " name its reduction axis and its output axis by integers."
        )
    given = [int(axis) for axis in given]
    if any(not -ndim <= axis < ndim for axis in given):
        raise ValueError(
            f"dimension numbers of leaf {where} name axes {tuple(given)}, but it has {ndim} axes."
        )
    return tuple(axis % ndim for axis in given)


@dataclasses.dataclass(frozen=True)
class View:
    """How a leaf is seen as blocks: a transpose to (batch, rows, columns), then a reshape."""

    order: tuple[int, ...]  # the leaf's axes: batch axes, row axes, column axes
    batch: int  # how many of them are batch axes
    permuted: tuple[int, ...]  # the leaf's shape in that order
    shape: tuple[int, ...]  # (*batch, rows, columns)
    fan_in: int
    fan_out: int
    sharding: NamedSharding | None = None  # of the blocks, where it is known

    def of(self, leaf: Float[Array, "..."]) -> Float[Array, "*b m n"]:
        typed = self.sharding if explicit_sharding(leaf) is not None else None
        return jnp.reshape(leaf.transpose(self.order), self.shape, out_sharding=typed)

    def back(self, blocks: Float[Array, "*b m n"]) -> Float[Array, "..."]:
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return blocks.reshape(self.permuted).transpose(inverse)

    def block(self, leaf: Float[Array, "..."], number: Int[Array, ""]) -> Float[Array, "m n"]:
        """One of `of(leaf)`'s blocks, without the others."""
        if math.prod(self.shape[:-2]) == 1:
            return self.of(leaf).reshape(self.shape[-2:])
        batch = self.permuted[: self.batch]
        at = dict(zip(self.order, jnp.unravel_index(number, batch), strict=False))
        sizes = [1 if axis in at else size for axis, size in enumerate(leaf.shape)]
        piece = jax.lax.dynamic_slice(leaf, [at.get(axis, 0) for axis in range(leaf.ndim)], sizes)
        return piece.transpose(self.order).reshape(self.shape[-2:])


def plain_view(x: Any) -> View:
    """Of a leaf that is `(*, m, n)` as it stands."""
    *batch, m, n = x.shape
    return View(tuple(range(x.ndim)), len(batch), tuple(x.shape), tuple(x.shape), m, n)


def views_beside(tree: Any, views: Any) -> Any:
    """The views of a tree's leaves, one at each, where `tree` may have lost some to holes since."""
    if views is None:
        return jax.tree.map(plain_view, tree)
    leaves = jax.tree.leaves(tree, is_leaf=is_hole)
    kept = [v for x, v in zip(leaves, jax.tree.leaves(views, is_leaf=is_hole), strict=True) if not is_hole(x)]
    return jax.tree.structure(tree).unflatten(kept)


def _spec(sharding: NamedSharding, ndim: int) -> tuple[Any, ...]:
    """What each axis is sharded over."""
    return (*sharding.spec, *[None] * (ndim - len(sharding.spec)))


def view_of(path: Any, leaf: Any, entry: Entry, *, wide: bool) -> View:
    """The view of one leaf; `wide` puts first the side to project.

    That is the smaller of fan-in and fan-out, or, where dimension numbers tell the sharding, the one that is
    not sharded if the other is.

    Raises:
      ValueError: the leaf has no two matrix axes, or its dimension numbers overlap or are out of range.
      TypeError: the leaf is complex or integer.
    """
    check_matrix_leaf(path, leaf)
    where = jax.tree_util.keystr(path)
    assert not isinstance(entry, Parts), "kernels are taken apart before they are seen"
    if entry is None:
        raise ValueError(
            f"leaf {where} has None as its dimension numbers: it is not a matrix."
            " Give it to another rule with optax.partition, or use an optimizer's `others`."
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
    told = entry.sharding if isinstance(entry, ShardedDimensionNumbers) else None
    if told is not None:
        split = [any(_spec(told, leaf.ndim)[axis] for axis in axes) for axes in (reduction, output)]
        swapped = split[0] if split[0] != split[1] else swapped
    rows, columns = (output, reduction) if wide and swapped else (reduction, output)
    order = batch + rows + columns
    blocks = [leaf.shape[axis] for axis in batch]
    sides = [math.prod(leaf.shape[axis] for axis in axes) for axes in (rows, columns)]
    permuted = tuple(leaf.shape[i] for i in order)
    known = explicit_sharding(leaf) or told
    if known is not None:
        # Axes that are seen as one are sharded as the first of them.
        spec = _spec(known, leaf.ndim)
        over = [spec[axis] for axis in batch]
        known = NamedSharding(known.mesh, PartitionSpec(*over, spec[rows[0]], spec[columns[0]]))
    return View(order, len(batch), permuted, (*blocks, *sides), fan_in, fan_out, known)


def views_of(entries: Sequence[Entry], tree: Any, *, wide: bool) -> Any:
    """A tree of `View`s over the leaves of `tree`."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    views = [view_of(*leaf, entry, wide=wide) for leaf, entry in zip(leaves, entries, strict=True)]
    return treedef.unflatten(views)
