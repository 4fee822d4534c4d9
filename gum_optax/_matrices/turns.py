"""A turn of a step whose leaves are seen as matrices."""

import dataclasses
from typing import Any

import jax

from .._core.trees import flat, is_masked, leaf_indices_of
from .._core.turns import Place, Turn, WholeStep
from .parts import Apart
from .view import views_of


def turn_of_matrices(turn: WholeStep, kernels: Apart, updates: Any, *, wide: bool) -> WholeStep:
    """The turn of a tree, for the tree taken apart and viewed as matrices.

    Args:
      turn: of `updates`.
      kernels: takes `updates` apart.
      updates: the leaves of the turn, as the model has them.
      wide: as in `as_matrices`.

    Raises:
      ValueError: the axis that counts the layers of a stack is an axis of its matrices.
    """
    if not isinstance(turn, Turn):
        return turn
    own = turn.beside(updates)
    own_places = flat(own.places)
    entries = _entries_of_whole(own, kernels)
    whole = Apart(jax.tree.structure(own.shapes).unflatten(entries), own.shapes)
    parts = jax.eval_shape(whole.apart, own.shapes)
    views = views_of(whole.entries, parts, wide=wide)
    shapes = jax.eval_shape(lambda tree: jax.tree.map(lambda x, view: view.of(x), tree, views), parts)
    parts_of_leaf: dict[int, list[int]] = {}
    for part, leaf_index in enumerate(whole.leaf_indices(own.shapes)):
        parts_of_leaf.setdefault(leaf_index, []).append(part)
    places, seen = [], dict.fromkeys(range(len(own_places)), 0)
    for leaf_index in kernels.leaf_indices(updates):
        place, part = own_places[leaf_index], seen[leaf_index]
        seen[leaf_index] += 1
        if not is_masked(place):
            indices = tuple(parts_of_leaf[i][part] for i in place.leaf_indices)
            place = dataclasses.replace(place, leaf_indices=indices)
        places.append(place)
    tree = kernels.apart(updates)
    treedef = jax.tree.structure(tree, is_leaf=is_masked)
    _check_rows(places, views)
    return dataclasses.replace(own, shapes=shapes, places=treedef.unflatten(places))


def _entries_of_whole(turn: Turn, kernels: Apart) -> list[Any]:
    """The dimension numbers of each leaf of the whole tree."""
    by_leaf = {}
    for place, entry in zip(jax.tree.leaves(turn.places), kernels.given, strict=True):
        by_leaf |= dict.fromkeys(place.leaf_indices, entry)
    return [by_leaf[i] for i in leaf_indices_of(turn.shapes)]


def _check_rows(places: list[Place], views: Any) -> None:
    """Refuse a stack whose first axis is not a batch of matrices."""
    by_leaf = flat(views)
    for place in places:
        if not is_masked(place) and place.is_row and 0 not in by_leaf[place.leaf_indices[0]].order[:1]:
            raise ValueError(
                "layerwise_update needs matrices of which each belongs to one layer, but dimension numbers"
                " count the layers of a stack among the axes of its matrices."
            )
