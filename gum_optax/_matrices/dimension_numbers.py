"""Dimension numbers: which axes of a leaf are its fan-in, its fan-out, and a batch of blocks."""

import fnmatch
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax.contrib
from jax.sharding import NamedSharding

from .._core.checks import is_function
from .._core.trees import key_name
from .._mesh.axis_names import is_box

# Not imported by name: a checker of types then knows it without the types of optax.
MuonDimensionNumbers = optax.contrib.MuonDimensionNumbers

# Roles of a leaf, alone or in a stack.
LAST_TWO = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
"""A kernel of Flax: the last two axes, fan-in before fan-out; axes before them are blocks.

Examples:
  >>> rule = gum_optax.as_matrices(optax.trace(0.9), gum_optax.LAST_TWO, wide=False)
  >>> rule.init({"kernel": jnp.ones((3, 4, 8))}).trace["kernel"].shape  # blocks, fan-in, fan-out
  (3, 4, 8)
"""
OUT_IN = MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
"""A linear layer of PyTorch and Equinox, `(out, in)`.

Examples:
  >>> rule = gum_optax.as_matrices(optax.trace(0.9), gum_optax.OUT_IN, wide=False)
  >>> rule.init({"weight": jnp.ones((8, 4))}).trace["weight"].shape  # fan-in and fan-out
  (4, 8)
"""
SPLIT_HEADS_INPUT = MuonDimensionNumbers(reduction_axis=-3, output_axis=(-2, -1))
"""Queries, keys or values with a separate axis for heads, `(embed, heads, head_dim)`.

Examples:
  >>> rule = gum_optax.as_matrices(optax.trace(0.9), gum_optax.SPLIT_HEADS_INPUT, wide=False)
  >>> rule.init({"query": jnp.ones((16, 4, 8))}).trace["query"].shape  # fan-in and fan-out
  (16, 32)
"""
SPLIT_HEADS_OUTPUT = MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=-1)
"""The output of attention with a separate axis for heads, `(heads, head_dim, embed)`.

Examples:
  >>> rule = gum_optax.as_matrices(optax.trace(0.9), gum_optax.SPLIT_HEADS_OUTPUT, wide=False)
  >>> rule.init({"out": jnp.ones((4, 8, 16))}).trace["out"].shape  # fan-in and fan-out
  (32, 16)
"""
CONV_HWIO = MuonDimensionNumbers(reduction_axis=(-4, -3, -2), output_axis=-1)
"""A two-dimensional convolution of Flax, `(height, width, in, out)`.

Examples:
  >>> rule = gum_optax.as_matrices(optax.trace(0.9), gum_optax.CONV_HWIO, wide=False)
  >>> rule.init({"kernel": jnp.ones((3, 3, 4, 8))}).trace["kernel"].shape  # fan-in and fan-out
  (36, 8)
"""
CONV_OIHW = MuonDimensionNumbers(reduction_axis=(-3, -2, -1), output_axis=-4)
"""A two-dimensional convolution of PyTorch and Equinox, `(out, in, height, width)`.

Examples:
  >>> rule = gum_optax.as_matrices(optax.trace(0.9), gum_optax.CONV_OIHW, wide=False)
  >>> rule.init({"weight": jnp.ones((8, 4, 3, 3))}).trace["weight"].shape  # fan-in and fan-out
  (36, 8)
"""

WeightDimensionNumbers = MuonDimensionNumbers | Any | Callable[[Any], Any] | None


class ShardedDimensionNumbers(NamedTuple):
    """`optax.contrib.MuonDimensionNumbers` with the leaf's sharding, as `with_shardings` returns them."""

    reduction_axis: Any
    output_axis: Any
    sharding: NamedSharding  # of the leaf


class Parts(NamedTuple):
    """Several matrices side by side along one axis of a kernel; the optimizer treats each matrix separately.

    | kernel | value |
    |---|---|
    | queries, keys and values `(d, 3 h)` | `Parts((h, h, h))` |
    | grouped queries `(d, q + 2 kv)` | `Parts((q, kv, kv))` |
    | gate and up `(d, 2 f)` of PyTorch, `(2 f, d)` | `Parts((f, f), axis=-2, numbers=OUT_IN)` |
    | each head of `(d, heads · head_dim)` for itself | `Parts(head_dim=head_dim)` |
    | each head of grouped queries | `Parts((q, kv, kv), head_dim=head_dim)` |
    | latent attention `(rank, heads, k + v)` | `Parts((k, v), numbers=SPLIT_HEADS_INPUT)` |

    Matrices on a separate axis need no parts. In `(d, 3, heads, head_dim)`, each of the three is a block by
    `MuonDimensionNumbers(-4, (-2, -1))`, and each head of each of the three by `MuonDimensionNumbers(-4,
    -1)`.

    The state at the kernel's place is a tuple with one entry per part, or a single array if `sizes` is
    `None`.

    Examples:
      >>> tx = gum_optax.muon(1e-3, weight_dimension_numbers={"*/qkv": gum_optax.Parts((16, 8, 8))})
      >>> gum_optax.describe(tx, {"attention": {"qkv": jnp.ones((16, 32))}}).leaves[0].blocks
      '1 of 16 × 16 + 1 of 8 × 16 + 1 of 8 × 16'
    """

    sizes: tuple[int, ...] | None = None  # sizes of the parts along the axis; None: one part
    axis: int = -1
    head_dim: int | None = None  # cuts each part further, into matrices of this width
    # The dimension numbers of a part, which has the axes of the kernel.
    numbers: MuonDimensionNumbers | ShardedDimensionNumbers = LAST_TWO


_WILDCARDS = frozenset("*?[")  # of `fnmatch`

Entry = MuonDimensionNumbers | ShardedDimensionNumbers | Parts | None


def _is_entry(x: Any) -> bool:
    return isinstance(x, Entry)


def unboxed(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A tree path without the final `.value` of an NNX variable or a Linen box."""
    is_boxed = bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return path[:-1] if is_boxed else path


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names along a tree path, equal for dicts, dataclasses and Flax NNX states.

    The path of an NNX leaf ends in `.value` in `init`, but not in `update`.
    """
    return tuple(str(key_name(key)) for key in unboxed(path))


def is_patterns(spec: Any, tree: Any) -> bool:
    """Whether `spec` maps path patterns to roles; otherwise it is a tree of dimension numbers like `tree`."""
    if not isinstance(spec, dict) or not all(isinstance(x, str) for x in spec):
        return False
    flat = set(leaf_names(tree))
    return all(map(_is_entry, spec.values())) and not all((name,) in flat for name in spec)


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str)


def check_patterns(spec: Any) -> None:
    """Raise a TypeError for a pattern that has no role, or for patterns that are no mapping."""
    if isinstance(spec, list) and spec and all(map(_is_pair, spec)):
        raise TypeError(f"weight_dimension_numbers takes patterns as a mapping; pass dict({spec!r}).")
    for pattern, role in spec.items() if isinstance(spec, dict) else ():
        if isinstance(pattern, str) and not _WILDCARDS.isdisjoint(pattern) and not _is_entry(role):
            raise TypeError(
                f"weight_dimension_numbers gives the pattern {pattern!r} the role {role!r}; a role is"
                " optax.contrib.MuonDimensionNumbers, such as gum_optax.LAST_TWO, gum_optax.Parts, or None"
                " for leaves that are not matrices."
            )


def matching(patterns: dict[str, Entry], name: str) -> str | None:
    """The first pattern that a path matches; `*` matches anything, slashes included."""
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def leaf_names(tree: Any) -> list[tuple[str, ...]]:
    """The names along the path of each leaf, without the names inside its box."""
    boxes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
    return [names_of(path) for path, box in boxes for _ in jax.tree.leaves(box)]


def dimension_numbers(spec: WeightDimensionNumbers, tree: Any) -> list[Entry]:
    """The dimension numbers of each leaf of `tree`, in the order of its leaves.

    Args:
      spec: one `MuonDimensionNumbers` or `Parts` for every leaf; a tree of them, with `None` for leaves that
        are not matrices; a function from the tree to such a tree; a mapping from path patterns to them, in
        which the first match decides; or `None`. A leaf that it does not decide has `LAST_TWO`.
      tree: a tree of arrays.

    Raises:
      ValueError: a leaf has no entry in the tree.
      TypeError: an entry is neither dimension numbers nor `None`.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    if not paths or spec is None:
        return [LAST_TWO] * len(paths)
    if is_function(spec):
        spec = spec(tree)  # pyright: ignore[reportCallIssue]
    if isinstance(spec, MuonDimensionNumbers | ShardedDimensionNumbers | Parts):
        return [spec] * len(paths)
    if isinstance(spec, dict) and is_patterns(spec, tree):
        patterns = [matching(spec, "/".join(names)) for names in leaf_names(tree)]
        return [LAST_TWO if pattern is None else spec[pattern] for pattern in patterns]
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
    """Convert one axis or several axes to a tuple of non-negative axes."""
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
