"""Lets rules discard their own new state when a step is rejected."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from .trees import is_masked, leaf_indices_of

# For a whole leaf, or for each matrix of a stack.
Accepted = Bool[Array, "*k"]


def choose(accepted: Accepted, new: Array, old: Array) -> Array:
    """`new` where a leaf, or a matrix of it, accepts the step, else `old`."""
    return jnp.where(accepted.reshape(accepted.shape + (1,) * (new.ndim - accepted.ndim)), new, old)


class Acceptance:
    """Says which leaves accept a step. A leaf that rejects its step keeps its state.

    A rule that reads `accept` of the context may choose between a new array and the old one where it makes
    the new one. Everything after it then reads the array that is stored, so that no second array stays in
    memory. The acceptance remembers those arrays as kept, and does not choose again.

    Args:
      all_leaves: whether all leaves accept. It depends on every gradient, so only small arrays may wait for
        it.
      by_leaf: whether each leaf accepts, by its index in the tree (see `leaf_indices_of`). Default: each leaf
        accepts if all leaves do.
    """

    def __init__(self, all_leaves: Bool[Array, ""], by_leaf: Mapping[int, Accepted] | None = None):
        self.all_leaves = all_leaves
        self.by_leaf = by_leaf
        self._kept: dict[int, Any] = {}  # holds the arrays, so that no other array takes their id

    def allow_refresh(self, is_refresh: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether a new period begins: a step that the whole tree rejects begins none."""
        return is_refresh & self.all_leaves if self.by_leaf is None else is_refresh

    def of_leaves(self, tree: Any) -> list[Accepted]:
        """Whether each leaf accepts, of a tree in which every leaf has its parameter's index."""
        if self.by_leaf is None:
            return [self.all_leaves] * len(jax.tree.leaves(tree))
        return [self.by_leaf[leaf_index] for leaf_index in leaf_indices_of(tree)]

    def keep_if_rejected(self, new: Any, old: Any) -> Any:
        """The leaves of `new`, or of `old` where a leaf rejects; leaves have their parameters' indices."""
        treedef = jax.tree.structure(new)
        rows = map(self.keep_leaf_if_rejected, self.of_leaves(new), *map(jax.tree.leaves, (new, old)))
        return treedef.unflatten(rows)

    def keep_leaf_if_rejected(self, accepted: Accepted, new: Any, old: Any) -> Any:
        """The arrays of `new`, or those of `old` where not `accepted`: several arrays of one leaf."""
        return self.mark_kept(jax.tree.map(functools.partial(choose, accepted), new, old))

    def keep_refreshed_if_rejected(
        self, inner: optax.GradientTransformation, new: Any, old: Any, like: Any
    ) -> Any:
        """The state `new` of `inner` at the start of a period, or `old` for leaves that reject the step.

        Args:
          inner: the rule, whose state is chosen from.
          new: its state after the refresh.
          old: its state before the refresh.
          like: a tree of the leaves that `inner` runs on.
        """
        if self.by_leaf is None:
            return new  # `allow_refresh` has prevented the refresh
        leaves = jax.tree.structure(like).unflatten(self.of_leaves(like))
        # An array that belongs to no leaf, such as a count, is left to `keep_rest_if_rejected`.
        accepted = optax.tree.map_params(
            inner,
            lambda x, yes: x if is_masked(x) else yes,
            old,
            leaves,
            transform_non_params=lambda _: jnp.asarray(True),
            is_leaf=is_masked,
        )
        return jax.tree.map(choose, accepted, new, old)

    def keep_rest_if_rejected(self, new: Any, old: Any) -> Any:
        """The arrays of `new`, or those of `old` unless all leaves accept; arrays kept before stay."""

        def kept(after, before):
            return after if self.is_kept(after) else jnp.where(self.all_leaves, after, before)

        return self.mark_kept(jax.tree.map(kept, new, old))

    def is_kept(self, array: Any) -> bool:
        """Whether an array already is the old one where its leaf rejects."""
        return id(array) in self._kept

    def mark_kept(self, tree: Any) -> Any:
        """`tree`, of whose arrays `is_kept` is true from now on."""
        self._kept |= {id(x): x for x in jax.tree.leaves(tree)}
        return tree

    def mark_kept_by(self, other: "Acceptance", tree: Any) -> None:
        """Marks the arrays of `tree` that `other`, for other leaves of the same parameters, has kept."""
        self.mark_kept([x for x in jax.tree.leaves(tree) if other.is_kept(x)])
