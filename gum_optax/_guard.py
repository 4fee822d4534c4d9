"""Whether a step is taken, told to the rules that can keep their state where they make it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


class Guard:
    """Lets a step that is not taken leave its state as it was.

    `skip_non_finite` keeps every leaf of the state in the end. A rule that takes the argument `guard` may do
    it itself, where the leaf is made: everything after it then reads the leaf that is stored, and no second
    one stays in memory. What was kept once is not kept again.
    """

    def __init__(self, taken: Bool[Array, ""]):
        self.taken = taken
        self._kept: dict[int, Any] = {}  # holds the leaves, so that no other takes their id

    def has(self, leaf: Any) -> bool:
        """Whether a leaf was kept."""
        return id(leaf) in self._kept

    def keep(self, new: Any, old: Any) -> Any:
        """The leaves of `new`, or those of `old` where the step is not taken."""

        def choose(after, before):
            return after if self.has(after) else jnp.where(self.taken, after, before)

        return self.as_kept(jax.tree.map(choose, new, old))

    def as_kept(self, tree: Any) -> Any:
        """`tree`, whose leaves are as they were already where the step is not taken."""
        self._kept |= {id(x): x for x in jax.tree.leaves(tree)}
        return tree
