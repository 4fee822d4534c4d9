"""Trees with masked leaves: an `optax.MaskedNode` stands for a leaf that a rule does not see."""

from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def is_masked(x: Any) -> bool:
    """Whether a leaf is masked."""
    return isinstance(x, optax.MaskedNode)


def leaf_indices_of(tree: Any) -> list[int]:
    """The indices of a tree's leaves among all leaves, masked ones included."""
    return [leaf_index for leaf_index, x in enumerate(flat(tree)) if not is_masked(x)]


def flat(tree: Any) -> list[Any]:
    """Leaves, masked ones included."""
    return jax.tree.leaves(tree, is_leaf=is_masked)


def key_name(key: Any) -> Any:
    """The content of one key of a tree path: a dict key, a field name or a sequence index."""
    return getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))


def is_state_field(path: Any, _: Any) -> bool:
    """Whether a path of optax leads to the field of a NamedTuple, and not to a module of that name."""
    return isinstance(path[-1], optax.tree_utils.NamedTupleKey)


def concrete(tree: Any) -> Any:
    """Replace shapes by zeros. `init` reads no values, so it accepts shapes as optax's own `init`s do."""

    def zeros(x):
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    return jax.tree.map(zeros, tree)


def leaves_of_prefix(prefix: Any, tree: Any) -> list[Any]:
    """For each leaf of `tree`, the leaf of a tree that may end above it."""
    return jax.tree.leaves(jax.tree.map(lambda x, below: jax.tree.map(lambda _: x, below), prefix, tree))


def masked_where(tree: Any, gone: Container[int]) -> Any:
    """`tree` without some leaves, by their indices among all leaves, masked ones included."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_masked)
    return treedef.unflatten([optax.MaskedNode() if i in gone else x for i, x in enumerate(leaves)])


def split(tree: Any, chosen: Sequence[bool]) -> tuple[Any, Any]:
    """The chosen leaves and the others, each masked where the other has leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = list(zip(leaves, chosen, strict=True))
    some = [leaf if yes else optax.MaskedNode() for leaf, yes in pairs]
    rest = [optax.MaskedNode() if yes else leaf for leaf, yes in pairs]
    return treedef.unflatten(some), treedef.unflatten(rest)


def merge(some: Any, rest: Any) -> Any:
    """The tree that `split` took apart."""
    return jax.tree.map(lambda a, b: b if is_masked(a) else a, some, rest, is_leaf=is_masked)


def map_with_leaf_index(f: Callable[..., Any], tree: Any) -> Any:
    """`jax.tree.map`, with the position of each leaf in the tree as the first argument."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([f(leaf_index, x) for leaf_index, x in enumerate(leaves)])


def columns(tree: Any, rows: Any, width: int) -> list[Any]:
    """Trees of the first, second, ... entries of `rows`, which has a tuple at each leaf of `tree`."""
    return [jax.tree.map(lambda _, row, i=i: row[i], tree, rows) for i in range(width)]
