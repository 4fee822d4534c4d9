"""A model's leaves with the metadata of their library, and the readings that the rules return."""

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

KERNELS = frozenset({"kernel", "weight", "w", "embedding", "weights", "embeddings"})
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")


@functools.lru_cache(maxsize=4096)
def words(name: str) -> tuple[str, ...]:
    """The words of a name: `MultiHeadAttention_0` has multi, head and attention."""
    return tuple(word.lower() for word in _WORD.findall(name))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of a model.

    Haiku writes `mlp/~/linear_0`, and Penzai `block_0.attention`, as one key; `path` has the names
    separately.
    """

    index: int  # position among the leaves of the tree
    path: Path
    shape: Shape
    axes: tuple[str | None, ...] = ()  # axis names, if the library has them
    module: Any = None  # the Equinox or Haliax module that holds the leaf
    stack: tuple[int, ...] = ()  # axes that count layers or experts, as far as known
    factor: tuple[str, Path] | None = None  # of a LoRA factor: its side, "a" or "b", and the path of the pair

    @property
    def name(self) -> str:
        """The last name of the path."""
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
    """The interpretation of a leaf."""

    entry: Any  # an `Entry` with fan-in and fan-out; None: the leaf is not a matrix
    kind: str  # "matrix", "embedding", "head", "vector", ...
    reason: str
    doubt: str = ""  # another, equally plausible reading
    head: Any = None  # of a head, which has no entry: the dimension numbers of its fan-in and fan-out


# A rule of the policy returns its reading of a leaf, or None if it does not apply.
Rule = Callable[[Leaf, "Model"], Reading | None]


class Model:
    """All leaves of a tree, so that rules can look at the neighbours of a leaf."""

    def __init__(self, leaves: Sequence[Leaf]):
        self.leaves = tuple(leaves)
        self._inside: dict[Path, list[Leaf]] = {}
        self._known: dict[Any, Any] = {}
        for leaf in self.leaves:
            for depth in range(len(leaf.path) + 1):
                self._inside.setdefault(leaf.path[:depth], []).append(leaf)

    def once(self, f: Callable[["Model"], Any]) -> Any:
        """`f(model)`, computed once for all leaves."""
        if f not in self._known:
            self._known[f] = f(self)
        return self._known[f]

    def inside(self, module: Path) -> list[Leaf]:
        """The leaves of a module at any depth."""
        return self._inside.get(module, [])

    def modules(self) -> Iterator[Path]:
        """The paths of all modules, outer modules first."""
        return iter(sorted(self._inside, key=len))

    def around(self, leaf: Leaf) -> Iterator[list[Leaf]]:
        """The leaves of the module that holds a leaf, then those of the next two outer modules."""
        for depth in range(len(leaf.path) - 1, max(len(leaf.path) - 4, -1), -1):
            yield self.inside(leaf.path[:depth])

    def sibling(self, leaf: Leaf, name: str) -> Leaf | None:
        """The leaf with the given name in the same module."""
        path = (*leaf.path[:-1], name)
        return next((x for x in self.inside(path) if x.path == path), None)


def numbers(leaf: Leaf, reduction: Sequence[int], output: Sequence[int]) -> MuonDimensionNumbers:
    """Dimension numbers with axes counted from the end, so that a stack in front does not change them."""

    def from_end(axes):
        counted = tuple(axis - len(leaf.shape) for axis in axes)
        return counted[0] if len(counted) == 1 else counted

    return MuonDimensionNumbers(from_end(reduction), from_end(output))


def matrix(leaf: Leaf, reduction: Sequence[int], output: Sequence[int], reason: str) -> Reading:
    """The reading of a matrix with the given axes for fan-in and fan-out."""
    return Reading(numbers(leaf, reduction, output), "matrix", reason)


def last_two(leaf: Leaf, reason: str) -> Reading:
    """The reading of a matrix of the last two axes that are free."""
    free = leaf.free[-2:]
    return matrix(leaf, free[:1], free[1:], reason)


def _path(path: Any) -> Path:
    parts = (part for name in names_of(path) for part in re.split(r"[/.]", name))
    return tuple(part for part in parts if part not in ("", "~"))


def _is_module(x: Any) -> bool:
    """Whether `x` is a layer of Equinox or Haliax, or of a derived class; layers are nodes of a tree."""
    classes = type(x).__mro__
    return any(c.__module__.startswith(("equinox.nn", "haliax.nn")) for c in classes) and not is_box(x)


def _modules(tree: Any) -> dict[Path, Any]:
    """All layers by their paths."""
    layers = {}

    def look(path, node):
        for inner, x in jax.tree_util.tree_leaves_with_path(
            node, is_leaf=lambda y: y is not node and _is_module(y)
        ):
            if _is_module(x):
                layers[_path((*path, *inner))] = x
                look((*path, *inner), x)

    if _is_module(tree):
        layers[()] = tree
    look((), tree)
    return layers


def leaves_of(params: Any) -> list[Leaf]:
    """One `Leaf` for each leaf of the tree, in the order of the tree."""
    modules, leaves = _modules(params), []
    for path, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box):
        content, axes = unbox(x)
        names = _path(path)
        for array in jax.tree.leaves(content):
            shape = tuple(jnp.shape(array))
            named = axes if len(axes) == len(shape) else ()
            leaves.append(Leaf(len(leaves), names, shape, named, modules.get(names[:-1])))
    return leaves
