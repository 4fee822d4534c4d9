"""A model's leaves, with what their library says of them, and the readings that come of it."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from ..._mesh.axis_names import is_box, unbox
from ..dimension_numbers import names_of

Shape = tuple[int, ...]
Path = tuple[str, ...]

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")


@functools.lru_cache(maxsize=4096)
def words(name: str) -> tuple[str, ...]:
    """`MultiHeadAttention_0` is multi, head, attention."""
    return tuple(word.lower() for word in _WORD.findall(name))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of a model.

    Haiku writes `mlp/~/linear_0` and Penzai `block_0.attention` in one key: `path` has each name by itself.
    """

    index: int  # among the leaves of the tree
    path: Path
    shape: Shape
    axes: tuple[str | None, ...] = ()  # names of axes, where the library has some
    module: Any = None  # the module of Equinox or Haliax that holds the leaf
    stack: tuple[int, ...] = ()  # axes that count layers or experts, as far as they are known

    @property
    def name(self) -> str:
        """The leaf's own."""
        return self.path[-1] if self.path else ""

    @property
    def free(self) -> tuple[int, ...]:
        """The axes of a block."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.stack)

    @property
    def block(self) -> Shape:
        """The shape of a block."""
        return tuple(self.shape[axis] for axis in self.free)


class Reading(NamedTuple):
    """What a leaf is taken for."""

    entry: Any  # `Entry`: its fan-in and fan-out; None: it is not a matrix
    kind: str  # "matrix", "embedding", "head", "vector", ...
    reason: str
    doubt: str = ""  # another reading that is as plausible


# One rule of the policy: what it takes a leaf for, or None where it has no say.
Rule = Callable[[Leaf, "Model"], Reading | None]


class Model:
    """All leaves of a tree, to look beside and around each."""

    def __init__(self, leaves: Sequence[Leaf]):
        self.leaves = tuple(leaves)
        self._inside: dict[Path, list[Leaf]] = {}
        self._known: dict[Any, Any] = {}
        for leaf in self.leaves:
            for depth in range(len(leaf.path) + 1):
                self._inside.setdefault(leaf.path[:depth], []).append(leaf)

    def once(self, f: Callable[["Model"], Any]) -> Any:
        """`f` of the model, which many leaves ask for."""
        if f not in self._known:
            self._known[f] = f(self)
        return self._known[f]

    def inside(self, module: Path) -> list[Leaf]:
        """The leaves of a module, deep ones too."""
        return self._inside.get(module, [])

    def modules(self) -> Iterator[Path]:
        """The paths of all modules, outer ones first."""
        return iter(sorted(self._inside, key=len))

    def around(self, leaf: Leaf, levels: int = 3) -> Iterator[list[Leaf]]:
        """The leaves of the module that holds a leaf, of the one around that, and so on."""
        for depth in range(len(leaf.path) - 1, max(len(leaf.path) - 1 - levels, -1), -1):
            yield self.inside(leaf.path[:depth])

    def sibling(self, leaf: Leaf, name: str) -> Leaf | None:
        """The leaf of that name in the same module."""
        path = (*leaf.path[:-1], name)
        return next((x for x in self.inside(path) if x.path == path), None)


def numbers(leaf: Leaf, reduction: Sequence[int], output: Sequence[int]) -> MuonDimensionNumbers:
    """Dimension numbers from axes, counted from the end: a stack in front changes nothing."""

    def from_end(axes):
        counted = tuple(axis - len(leaf.shape) for axis in axes)
        return counted[0] if len(counted) == 1 else counted

    return MuonDimensionNumbers(from_end(reduction), from_end(output))


def matrix(leaf: Leaf, reduction: Sequence[int], output: Sequence[int], reason: str) -> Reading:
    """A matrix from the axes of its fan-in to those of its fan-out."""
    return Reading(numbers(leaf, reduction, output), "matrix", reason)


def _path(path: Any) -> Path:
    found = (part for name in names_of(path) for part in re.split(r"[/.]", name))
    return tuple(part for part in found if part not in ("", "~"))


def _is_module(x: Any) -> bool:
    """A layer of Equinox or Haliax, or of a class derived from one; they are nodes of a tree."""
    kinds = type(x).__mro__
    return any(kind.__module__.startswith(("equinox.nn", "haliax.nn")) for kind in kinds) and not is_box(x)


def _modules(tree: Any) -> dict[Path, Any]:
    """Every layer by its path."""
    found = {}

    def look(path, node):
        for inner, x in jax.tree_util.tree_leaves_with_path(
            node, is_leaf=lambda y: y is not node and _is_module(y)
        ):
            if _is_module(x):
                found[_path((*path, *inner))] = x
                look((*path, *inner), x)

    if _is_module(tree):
        found[()] = tree
    look((), tree)
    return found


def leaves_of(params: Any) -> list[Leaf]:
    """One `Leaf` for each leaf of the tree, in its order."""
    modules, leaves = _modules(params), []
    for path, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box):
        content, axes = unbox(x)
        names = _path(path)
        for array in jax.tree.leaves(content):
            shape = tuple(jnp.shape(array))
            named = axes if len(axes) == len(shape) else ()
            leaves.append(Leaf(len(leaves), names, shape, named, modules.get(names[:-1])))
    return leaves
