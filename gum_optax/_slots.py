"""Groups of same-shaped blocks across leaves, and the few of them that stand in slots.

Full-size leaves are never concatenated: a slot is read by a branch on the leaf that holds its block,
and written back into the leaves that hold one.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Group(NamedTuple):
    """The blocks of one shape; which leaves hold them, how many there are, how many get a slot."""

    name: str  # its shape, "64x256": stable across processes and the dtypes of gradients
    shape: tuple[int, int]
    places: tuple[int, ...]  # positions of its leaves in the flattened tree
    sizes: tuple[int, ...]  # blocks of each of these leaves
    slots: int

    @property
    def blocks(self) -> int:
        return sum(self.sizes)

    @property
    def starts(self) -> tuple[int, ...]:
        """The number of each leaf's first block."""
        return tuple(sum(self.sizes[:i]) for i in range(len(self.sizes)))

    @property
    def fraction(self) -> float:
        """The realised `q`."""
        return self.slots / self.blocks

    @property
    def is_full(self) -> bool:
        return self.slots == self.blocks


def groups_of(tree: Any, rank: int, fraction: float) -> dict[str, Group]:
    """Group the leaves of `tree` by the shape of their blocks.

    `slots = clip(round(fraction · L), 1, L)`, 0 when the fraction is 0; all `L` where `m <= rank`.
    """
    members: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for place, leaf in enumerate(jax.tree.leaves(tree)):
        members.setdefault(leaf.shape[-2:], []).append((place, math.prod(leaf.shape[:-2])))
    groups = {}
    for shape, found in sorted(members.items()):
        places, sizes = zip(*found, strict=True)
        total = sum(sizes)
        slots = min(max(round(fraction * total), 1), total) if fraction > 0 else 0
        if shape[0] <= rank:
            slots = total
        name = f"{shape[0]}x{shape[1]}"
        groups[name] = Group(name, shape, places, sizes, slots)
    return groups


def _as_blocks(x: Array) -> Array:
    return x.reshape(-1, *x.shape[-2:])


def take(leaves: Sequence[Any], index: Int[Array, "k"], group: Group) -> Any:
    """The blocks at `index`, counted over the group's leaves: a tree of float32 `(k, ...)` arrays.

    `leaves` has one entry a leaf of the group: an array `(*, m, n)` or a tuple of such arrays.
    """
    blocked = [jax.tree.map(_as_blocks, leaf) for leaf in leaves]
    if len(blocked) == 1:
        return jax.tree.map(lambda x: jnp.take(x, index, axis=0, mode="clip").astype(jnp.float32), blocked[0])
    starts = jnp.asarray(group.starts)

    def read(leaf):
        return lambda local: jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, local, keepdims=False).astype(jnp.float32), leaf
        )

    def one(i):
        leaf = jnp.searchsorted(starts, i, side="right") - 1
        return jax.lax.switch(leaf, [read(x) for x in blocked], i - starts[leaf])

    chosen = [one(index[slot]) for slot in range(group.slots)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *chosen)


def put(
    leaf: Float[Array, "... m n"],
    *,
    values: Float[Array, "k m n"],
    index: Int[Array, "k"],
    start: int,
    alone: bool,
) -> Float[Array, "... m n"]:
    """A leaf, whose first block is number `start`, with `values` in place of the blocks at `index`.

    `alone` says that it holds all blocks of its group.
    """
    size = math.prod(leaf.shape[:-2])
    here = (index >= start) & (index < start + size)
    # Out of range is dropped; a negative index would count from the end.
    local = jnp.where(here, index - start, size)

    def overwrite(x):
        return _as_blocks(x).at[local].set(values.astype(x.dtype), mode="drop").reshape(x.shape)

    return overwrite(leaf) if alone else jax.lax.cond(here.any(), overwrite, lambda x: x, leaf)
