"""Which leaves step, told to the rules that can keep their state where they make it."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from .trees import places_of

# For all of a leaf, or for each matrix of a stack.
Accepted = Bool[Array, "*k"]


def _choose(accepted: Accepted, new: Array, old: Array) -> Array:
    return jnp.where(accepted.reshape(accepted.shape + (1,) * (new.ndim - accepted.ndim)), new, old)


class Guard:
    """Lets a leaf that does not step leave its state as it was, and its step out of a step.

    A rule that takes the argument `guard` may keep an old array where it makes the new one: everything after
    it then reads the array that is stored, and no second one stays in memory. What was kept once is not kept
    again.

    Args:
      taken: whether the whole tree steps. It waits for all gradients, so only small arrays may wait for it.
      leaves: whether each leaf does, by its place in the tree (see `places_of`). Default: as the whole tree.
    """

    def __init__(self, taken: Bool[Array, ""], leaves: Mapping[int, Accepted] | None = None):
        self.taken = taken
        self.leaves = leaves
        self._kept: dict[int, Any] = {}  # holds the arrays, so that no other takes their id

    def due(self, due: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether a new period begins: not where the whole tree does not step."""
        return due & self.taken if self.leaves is None else due

    def accepted(self, tree: Any) -> list[Accepted]:
        """Whether each leaf steps, of a tree in which every leaf is at its parameter's place."""
        if self.leaves is None:
            return [self.taken] * len(jax.tree.leaves(tree))
        return [self.leaves[place] for place in places_of(tree)]

    def keep(self, new: Any, old: Any) -> Any:
        """The leaves of `new`, each at its parameter's place, or those of `old` that do not step."""
        treedef = jax.tree.structure(new)
        return treedef.unflatten(map(self.keep_where, self.accepted(new), *map(jax.tree.leaves, (new, old))))

    def keep_where(self, accepted: Accepted, new: Any, old: Any) -> Any:
        """The arrays of `new`, or where not `accepted` those of `old`."""
        return self.as_kept(jax.tree.map(functools.partial(_choose, accepted), new, old))

    def carried(self, inner: optax.GradientTransformation, new: Any, old: Any, like: Any) -> Any:
        """`inner`'s state `new` at the start of a period, or that before it of leaves that do not step."""
        if self.leaves is None:
            return new  # `due` has it already
        leaves = jax.tree.structure(like).unflatten(self.accepted(like))
        # What belongs to no leaf, a count, is kept with the rest.
        accepted = optax.tree.map_params(
            inner, lambda _, yes: yes, old, leaves, transform_non_params=lambda _: jnp.asarray(True)
        )
        return jax.tree.map(_choose, accepted, new, old)

    def keep_rest(self, new: Any, old: Any) -> Any:
        """The arrays of `new`; of those that no rule has kept, those of `old` unless the whole tree steps."""

        def choose(after, before):
            return after if self.has(after) else jnp.where(self.taken, after, before)

        return self.as_kept(jax.tree.map(choose, new, old))

    def has(self, array: Any) -> bool:
        """Whether an array was kept."""
        return id(array) in self._kept

    def as_kept(self, tree: Any) -> Any:
        """`tree`, whose arrays are as they were already where their leaf does not step."""
        self._kept |= {id(x): x for x in jax.tree.leaves(tree)}
        return tree
