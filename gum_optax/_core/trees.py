"""Masked trees: an `optax.MaskedNode`, here a hole, stands for a leaf that a rule does not see."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def is_hole(x: Any) -> bool:
    """Whether a leaf is masked."""
    return isinstance(x, optax.MaskedNode)


def places_of(tree: Any) -> list[int]:
    """The indices of a tree's leaves in `flat(tree)`, which counts masked leaves too."""
    return [place for place, x in enumerate(flat(tree)) if not is_hole(x)]


def flat(tree: Any) -> list[Any]:
    """The leaves of a tree, masked leaves included."""
    return jax.tree.leaves(tree, is_leaf=is_hole)


def key_name(key: Any) -> Any:
    """The content of one key of a tree path: a dict key, a field name or a sequence index."""
    return getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))


def concrete(tree: Any) -> Any:
    """Replace shapes by zeros. `init` reads no values, so it accepts shapes as optax's own `init`s do."""

    def zeros(x):
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    return jax.tree.map(zeros, tree)


def split(tree: Any, chosen: Sequence[bool]) -> tuple[Any, Any]:
    """Split a tree in two: the chosen leaves and the others, each with the other's leaves masked."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = list(zip(leaves, chosen, strict=True))
    some = [leaf if yes else optax.MaskedNode() for leaf, yes in pairs]
    rest = [optax.MaskedNode() if yes else leaf for leaf, yes in pairs]
    return treedef.unflatten(some), treedef.unflatten(rest)


def merge(some: Any, rest: Any) -> Any:
    """Undo `split`."""
    return jax.tree.map(lambda a, b: b if is_hole(a) else a, some, rest, is_leaf=is_hole)


def map_with_place(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`jax.tree.map`, but `f` takes the index of each leaf as its first argument."""
    leaves, treedef = jax.tree.flatten(tree)
    columns = [treedef.flatten_up_to(other) for other in others]
    return treedef.unflatten([f(place, *row) for place, row in enumerate(zip(leaves, *columns, strict=True))])
