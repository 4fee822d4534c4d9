"""Trees with holes: a leaf that a rule does not see is an `optax.MaskedNode` in its place."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def is_hole(x: Any) -> bool:
    """Whether a leaf's place is empty."""
    return isinstance(x, optax.MaskedNode)


def places_of(tree: Any) -> list[int]:
    """The positions of a tree's leaves among all leaves, holes being places too."""
    return [place for place, x in enumerate(flat(tree)) if not is_hole(x)]


def flat(tree: Any) -> list[Any]:
    """Leaves and holes."""
    return jax.tree.leaves(tree, is_leaf=is_hole)


def key_name(key: Any) -> Any:
    """What a key of a tree path says: of a dict its key, of a field its name, of a sequence the index."""
    return getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))


def concrete(tree: Any) -> Any:
    """Zeros in place of shapes: `init` reads no values, and so takes either, as optax's own do."""

    def zeros(x):
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    return jax.tree.map(zeros, tree)


def split(tree: Any, chosen: Sequence[bool]) -> tuple[Any, Any]:
    """The chosen leaves and the others, each with holes where the other has leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = list(zip(leaves, chosen, strict=True))
    some = [leaf if yes else optax.MaskedNode() for leaf, yes in pairs]
    rest = [optax.MaskedNode() if yes else leaf for leaf, yes in pairs]
    return treedef.unflatten(some), treedef.unflatten(rest)


def merge(some: Any, rest: Any) -> Any:
    """The tree that `split` took apart."""
    return jax.tree.map(lambda a, b: b if is_hole(a) else a, some, rest, is_leaf=is_hole)


def map_with_place(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`jax.tree.map`, with the position of each leaf in the tree as the first argument."""
    leaves, treedef = jax.tree.flatten(tree)
    columns = [treedef.flatten_up_to(other) for other in others]
    return treedef.unflatten([f(place, *row) for place, row in enumerate(zip(leaves, *columns, strict=True))])
