"""What a rule does when a step is taken in turns, one layer after the other, and not by all leaves at once.

`layerwise_update` calls `tx.update` once for the head, once for every layer and once for the embedding. Each
turn passes a tree with the structure of the whole tree. Only the leaves of the turn are live: the others are
zeros, and nobody reads their steps. A layer of a stack `(layers, *shape)` is a leaf `(1, *shape)`. Where
layers have leaves of their own, the tree of a turn holds one layer in place of all.

A rule that treats every block by itself needs to know nothing of this. The few rules that do not ask
`context.turn` what the whole tree decides:

- how the whole tree is routed and planned: `of_whole`;
- which random numbers a leaf draws in the whole tree: `keys` and `row_key`;
- what is summed up over all leaves, and what several blocks share: `accumulate`;
- what no leaf decides: `once`.

A `WholeStep`, the turn of an ordinary step, answers the same questions for all leaves at once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, UInt32

from .keys import RowKey, streams
from .measurements import get_opaque_trace_state
from .trees import is_masked, leaf_indices_of, masked_where


class WholeStep:
    """The turn of an ordinary step, in which all leaves step at once."""

    def of_whole(self, tree: Any, decide: Callable[[Any], Any]) -> Any:
        """What `decide` says of each leaf, a list in the order of the leaves, given the whole tree."""
        return decide(tree)

    def whole(self, tree: Any) -> Any:
        """The whole tree of which `tree` has some leaves."""
        return tree

    def keys(self, tree: Any, key: UInt32[Array, "2"], period: Int[Array, ""]) -> Key[Array, "leaves"]:
        """The key of each leaf in one period, by its index among all leaves."""
        return streams(key, period, jnp.asarray(self.leaf_indices(tree), jnp.int32))

    def leaf_indices(self, tree: Any) -> list[Any]:
        """The index of each leaf among the leaves of the whole tree."""
        return list(range(len(jax.tree.leaves(tree))))

    def rows(self, tree: Any) -> list[Any]:
        """Which row of its stack each leaf is; 0 for a leaf that is no row."""
        return [0] * len(jax.tree.leaves(tree))

    def row_key(self, key: Any) -> Any:
        """The key of a draw that has a number for every number of a leaf."""
        return key

    def are_live(self, tree: Any) -> list[bool]:
        """Whether each leaf takes a step in this turn."""
        return [True] * len(jax.tree.leaves(tree))

    def accumulate(self, start: Any, f: Callable[[Any], Any]) -> Any:
        """`f` of what the turns before have left, which is `start` in the first turn."""
        return f(start)

    def once(self, make: Callable[[], Any]) -> Any:
        """What `make` makes in the first turn: what depends on no leaf, and is compiled once."""
        return make()

    def mark(self, array: Any) -> Any:
        """`array`, which has its value even if the loss is not finite."""
        return array

    is_probe = False  # whether only the dependence of steps on gradients is traced


WHOLE_STEP = WholeStep()


class Probe(WholeStep):
    """A trace that only follows which step depends on which gradient.

    A rule that asks `context.turn` what it needs works layer by layer, whatever its trace looks like. In a
    probe it returns the updates and its state as they are.
    """

    is_probe = True


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf of a turn stands in the whole tree."""

    leaf_indices: tuple[int, ...]  # its index there, masked leaves included: one, or one for every layer
    is_row: bool  # whether it is a row of that leaf
    is_live: bool

    def of_layer(self, values: Mapping[int, int], layer: Any) -> Any:
        """The entry for this leaf in a table for the leaves of the whole tree."""
        own = [values[i] for i in self.leaf_indices]
        return own[0] if len(own) == 1 else jnp.asarray(own)[layer]


class Ledger:
    """What is carried from turn to turn. Every turn makes the same entries, in the same order."""

    def __init__(self, before: list[Any] | None):
        self._before = before
        self._trace = get_opaque_trace_state(convention="flax")
        self.after: list[Any] = []
        self.marked: dict[int, Any] = {}  # holds the arrays, so that no other array takes their id

    def entry(self, start: Any, f: Callable[[Any], Any]) -> Any:
        """The next entry: `f` of the entry of the turn before.

        Raises:
          ValueError: the update is traced within a conditional, out of which nothing can be carried.
        """
        if get_opaque_trace_state(convention="flax") != self._trace:
            raise ValueError(
                "tx runs an optimizer of this library within a conditional, as optax.MultiSteps and"
                " optax.apply_if_finite do, where layerwise_update cannot carry anything from layer to layer."
                " Leave that out: a gradient that is not finite is skipped without it; average microbatches"
                " with gum_optax.projected_update."
            )
        before = start if self._before is None else self._before[len(self.after)]
        # Without weak types, so that every turn has the same.
        self.after.append(jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), f(before)))
        return self.after[-1]


@dataclasses.dataclass(frozen=True)
class Turn(WholeStep):
    """One of several turns of a step.

    Attributes:
      shapes: the whole tree, as `jax.ShapeDtypeStruct`s.
      places: a tree with a `Place` for each leaf of the turn's tree.
      layer: the number of the layer; 0 in the turns of embedding and head.
      layers: how many layers there are.
      is_accepted: whether the loss is finite.
      is_last: the last turn has no live leaf: it makes the state that leaves share.
      ledger: what is carried from turn to turn.
    """

    shapes: Any
    places: Any
    layer: Int[Array, ""] | int
    layers: int
    is_accepted: Bool[Array, ""]
    is_last: bool
    ledger: Ledger

    def beside(self, tree: Any) -> "Turn":
        """This turn for a tree in which more leaves, or whole subtrees, are masked."""
        gone: set[int] = set()

        def kept(x, places):
            if not is_masked(x):
                return places
            gone.update(i for place in jax.tree.leaves(places) for i in place.leaf_indices)
            return x

        places = jax.tree.map(kept, tree, self.places, is_leaf=is_masked)
        return dataclasses.replace(self, shapes=masked_where(self.shapes, gone), places=places)

    def of_whole(self, tree: Any, decide: Callable[[Any], Any]) -> list[Any]:
        own, decisions = self.beside(tree), []
        # Within a trace, so that functions of parameters see arrays.
        jax.eval_shape(lambda whole: decisions.extend(decide(whole)), own.shapes)
        by_leaf = dict(zip(leaf_indices_of(own.shapes), decisions, strict=True))
        found = [[by_leaf[i] for i in place.leaf_indices] for place in jax.tree.leaves(own.places)]
        for several in found:
            if any(x != several[0] for x in several):
                raise ValueError(
                    "layerwise_update needs layers that the optimizer treats alike, but one leaf is"
                    f" {several[0]} in the first layer and {next(x for x in several if x != several[0])} in"
                    " another."
                )
        return [several[0] for several in found]

    def whole(self, tree: Any) -> Any:
        return self.beside(tree).shapes

    def entries(self, tree: Any, numbers: Sequence[int]) -> list[Any]:
        """The number of each leaf of the turn, from a number for each leaf of the whole tree."""
        own = self.beside(tree)
        by_leaf = dict(zip(leaf_indices_of(own.shapes), numbers, strict=True))
        return [place.of_layer(by_leaf, self.layer) for place in jax.tree.leaves(own.places)]

    def leaf_indices(self, tree: Any) -> list[Any]:
        return self.entries(tree, range(len(jax.tree.leaves(self.beside(tree).shapes))))

    def rows(self, tree: Any) -> list[Any]:
        return [self.layer if place.is_row else 0 for place in jax.tree.leaves(self.beside(tree).places)]

    def inside(self, shapes: Any, places: Any, row: Any, rows: int) -> "Turn":
        """This turn for a rule that a rule runs on stacks of its own, for one row of them."""
        return dataclasses.replace(self, shapes=shapes, places=places, layer=row, layers=rows, is_last=False)

    @property
    def is_of_rows(self) -> bool:
        """Whether the live leaves of this turn are rows."""
        return any(place.is_row and place.is_live for place in jax.tree.leaves(self.places))

    def row_key(self, key: Any) -> Any:
        return RowKey(key, jnp.asarray(self.layer), self.layers) if self.is_of_rows else key

    def are_live(self, tree: Any) -> list[bool]:
        return [place.is_live for place in jax.tree.leaves(self.beside(tree).places)]

    def accumulate(self, start: Any, f: Callable[[Any], Any]) -> Any:
        return self.ledger.entry(start, f)

    def once(self, make: Callable[[], Any]) -> Any:
        return self.ledger.entry(None, lambda before: make() if before is None else before)

    def mark(self, array: Any) -> Any:
        self.ledger.marked[id(array)] = array
        return array
