"""A turn of a step whose leaves are seen as matrices."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from .._core.trees import flat, is_masked, leaf_indices_of
from .._core.turns import Place, Turn, WholeStep
from .dimension_numbers import names_of
from .parts import Apart
from .view import View, views_of


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
    paths = jax.tree_util.tree_leaves_with_path(own.shapes, is_leaf=is_masked)
    names = ["/".join(names_of(paths[leaf_index][0])) for leaf_index in whole.leaf_indices(own.shapes)]
    _check_rows(places, flat(views), names)
    return dataclasses.replace(own, shapes=shapes, places=treedef.unflatten(places))


def _entries_of_whole(turn: Turn, kernels: Apart) -> list[Any]:
    """The dimension numbers of each leaf of the whole tree."""
    by_leaf = {}
    for place, entry in zip(jax.tree.leaves(turn.places), kernels.given, strict=True):
        by_leaf |= dict.fromkeys(place.leaf_indices, entry)
    return [by_leaf[i] for i in leaf_indices_of(turn.shapes)]


def _check_rows(places: Sequence[Place], views: Sequence[View], names: Sequence[str]) -> None:
    """Refuse a stack whose first axis is not a batch of matrices."""
    for place in places:
        if is_masked(place) or not place.is_row:
            continue
        part = place.leaf_indices[0]
        # Without a batch axis, the first of `order` is an axis of the rows.
        if views[part].batch == 0 or views[part].order[0] != 0:
            raise ValueError(
                "layerwise_update needs matrices of which each belongs to one layer, but the dimension"
                f" numbers of {names[part]} count axis 0, the layers of the stack, among the axes of a"
                " matrix. Choose axes other than the first, or give the leaf None as its dimension numbers."
            )
