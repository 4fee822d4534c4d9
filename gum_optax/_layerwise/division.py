"""Divides parameters, gradients and states into embedding, layers, head, and what these share.

The parameters have three entries, `embed`, `layers` and `head`. A state mirrors the parameters at several
places: there it has the same three entries. Everything else, such as a count, is shared. A tree divided is a
list of pieces, each of one kind.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._core.trees import is_masked, key_name

KINDS = ("embed", "layers", "head")
SHARED = "shared"


def _children(node: Any) -> dict[Any, Any] | None:
    """The children of a node by their keys; None for a leaf."""
    if jax.tree_util.all_leaves([node]):
        return None
    children = jax.tree_util.default_registry.flatten_one_level_with_keys(node)[0]
    return {key_name(key): child for key, child in children}


class Divided(NamedTuple):
    """A tree as a list of pieces."""

    kinds: list[str]
    pieces: list[Any]
    treedef: Any

    def of_kind(self, kind: str) -> list[Any]:
        return [piece for own, piece in zip(self.kinds, self.pieces, strict=True) if own == kind]

    def with_pieces(self, pieces: Mapping[str, Sequence[Any]]) -> "Divided":
        """The same tree with other pieces of some kinds."""
        iterators = {kind: iter(new) for kind, new in pieces.items()}
        rows = zip(self.kinds, self.pieces, strict=True)
        new = [next(iterators[kind]) if kind in iterators else piece for kind, piece in rows]
        return self._replace(pieces=new)

    def tree(self) -> Any:
        return self.treedef.unflatten(self.pieces)


class Division:
    """How trees that mirror the parameters are divided.

    Args:
      params: the parameters.

    Raises:
      ValueError: the parameters do not have the three entries, there is no layer, or layers are not equal.
    """

    def __init__(self, params: Any):
        children = _children(params) or {}
        if set(children) != set(KINDS):
            raise ValueError(
                "params must have the entries 'embed', 'layers' and 'head', got"
                f" {sorted(map(str, children)) or type(params).__name__}."
            )
        self._nodes = children
        layers = children["layers"]
        self.is_stacked = not _is_sequence(layers)
        self.count = _count_of_stack(layers) if self.is_stacked else _count_of_sequence(layers)

    def divide(self, tree: Any) -> Divided:
        """The pieces of the parameters, or of a tree that mirrors them at some places."""
        rows, treedef = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=self._is_piece, is_leaf_takes_path=True
        )
        kinds = [str(key_name(path[-1])) if self._is_piece(path, x) else SHARED for path, x in rows]
        return Divided(kinds, [x for _, x in rows], treedef)

    def _is_piece(self, path: Any, node: Any) -> bool:
        """Whether a node is one of the three entries: it has the name and the children of the entry."""
        name = key_name(path[-1]) if path else None
        if name not in KINDS or is_masked(node):
            return False
        if name == "layers" and not self.is_stacked:
            return _is_sequence(node)  # of all layers, or of the one that has its turn
        mine, theirs = _children(node), _children(self._nodes[name])
        return theirs is None if mine is None else theirs is not None and list(mine) == list(theirs)

    def layer(self, piece: Any, number: Int[Array, ""] | int) -> Any:
        """A piece of layers that holds one of them: a row of each stack, or a sequence of one.

        Where layers are a sequence, `number` is an integer of Python.
        """
        if not self.is_stacked:
            return _sequence_like(piece, [_sequence(piece)[number]])
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, number, 1) if self._is_stack(x) else x, piece
        )

    def with_layer(self, piece: Any, number: Int[Array, ""] | int, new: Any) -> Any:
        """The piece of layers with one of them replaced: `new` is as `layer` returns it."""
        if not self.is_stacked:
            layers = _sequence(piece)
            (layers[number],) = _sequence(new)
            return _sequence_like(piece, layers)

        def put(x, row):
            return jax.lax.dynamic_update_slice_in_dim(x, row, number, 0) if self._is_stack(x) else x

        return jax.tree.map(put, piece, new)

    def one_layer(self, piece: Any) -> Any:
        """One layer of a piece as `layer` returns it, without the axis or the sequence around it."""
        if not self.is_stacked:
            (own,) = _sequence(piece)
            return own
        return jax.tree.map(lambda x: x[0], piece)

    def around(self, piece: Any, own: Any) -> Any:
        """`own`, which is as `one_layer` returns it, as `layer` would return it."""
        return jax.tree.map(lambda x: x[None], own) if self.is_stacked else _sequence_like(piece, [own])

    def around_each(self, piece: Any, f: Callable[[list[Any]], Any]) -> Any:
        """One layer as `layer` returns it, made by `f` from all layers, or from the stack of them."""
        if self.is_stacked:
            return f([piece])
        return _sequence_like(piece, [f(_sequence(piece))])

    def owned(self, piece: Any, of_layer: Callable[[int], Any], of_stack: Any, of_shared: Any) -> Any:
        """A piece of layers with something else at each leaf: for its layer, or for a stack of them.

        An array of the state that has no row for each layer belongs to no layer: it is shared.
        """
        if self.is_stacked:
            return jax.tree.map(lambda x: of_stack if self._is_stack(x) else of_shared, piece)
        layers = enumerate(_sequence(piece))
        return _sequence_like(piece, [jax.tree.map(lambda _, i=i: of_layer(i), own) for i, own in layers])

    def rest(self, piece: Any, new: Any) -> Any:
        """The piece of layers, with arrays of `new` in place of those that have no row for each layer."""
        if not self.is_stacked:
            return piece
        return jax.tree.map(lambda x, y: x if self._is_stack(x) else y, piece, new)

    def _is_stack(self, x: Any) -> bool:
        return jnp.ndim(x) > 0 and jnp.shape(x)[0] == self.count


def _is_sequence(layers: Any) -> bool:
    """Whether layers are a list, a tuple, or a mapping from their numbers, as `nnx.List` makes it."""
    if isinstance(layers, list | tuple) and not hasattr(layers, "_fields"):
        return True
    children = _children(layers) or {}
    return bool(children) and list(children) == list(range(len(children)))


def _sequence(layers: Any) -> list[Any]:
    """The layers of a sequence."""
    return list((_children(layers) or {}).values())


def _sequence_like(layers: Any, own: list[Any]) -> Any:
    """A sequence of the same type."""
    if isinstance(layers, list | tuple):
        return type(layers)(own)
    return type(layers)(dict(enumerate(own)))


def _count_of_stack(layers: Any) -> int:
    shapes = {jnp.shape(x)[:1] for x in jax.tree.leaves(layers)}
    if len(shapes) != 1 or shapes in ({()}, {(0,)}):
        raise ValueError(
            "params['layers'] must be a sequence of equal trees, or arrays whose first axis counts the"
            f" layers, at least one, as many in each; got first axes {sorted(shapes)}."
        )
    ((count,),) = shapes
    return count


def _count_of_sequence(layers: Any) -> int:
    children = _sequence(layers)
    kinds = {
        (jax.tree.structure(x), tuple((jnp.shape(y), jnp.result_type(y)) for y in jax.tree.leaves(x)))
        for x in children
    }
    if len(kinds) != 1:
        raise ValueError(
            f"params['layers'] must be a sequence of equal trees, at least one; got {len(kinds)} different"
            " ones: put layers of other shapes into embed or head."
        )
    return len(children)
