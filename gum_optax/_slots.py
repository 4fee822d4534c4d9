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

from ._dimensions import View


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


def take(
    members: Sequence[Sequence[tuple[Array, View]]], index: Int[Array, "k"], group: Group
) -> list[list[Float[Array, "..."]]]:
    """The blocks at `index`, counted over the group's leaves, in float32.

    Args:
      members: for each leaf of the group the arrays to read, as they are stored, each with its view.
      index: numbers of blocks.
      group: the group.

    Returns:
      For each slot the block of each of a member's arrays.
    """
    starts = jnp.asarray(group.starts)

    def reader(member):
        # Behind a barrier, or XLA would move the view out of the branch, and copy every leaf.
        return lambda local: [
            view.block(jax.lax.optimization_barrier(x), local).astype(jnp.float32).ravel()
            for x, view in member
        ]

    readers = [reader(member) for member in members]

    def one(i):
        leaf = jnp.searchsorted(starts, i, side="right") - 1
        flat = jax.lax.switch(leaf, readers, i - starts[leaf])
        return [x.reshape(view.shape[-2:]) for x, (_, view) in zip(flat, members[0], strict=True)]

    return [one(index[slot]) for slot in range(group.slots)]


def put(
    leaf: Float[Array, "... m n"],
    *,
    values: Float[Array, "k m n"],
    index: Int[Array, "k"],
    start: int,
) -> Float[Array, "... m n"]:
    """A leaf, whose first block is number `start`, with `values` in place of the blocks at `index`."""
    size = math.prod(leaf.shape[:-2])
    here = (index >= start) & (index < start + size)
    values = values.astype(leaf.dtype)
    if size == 1:
        # A choice that XLA can make entry by entry, where it next reads the leaf.
        return jnp.where(here.any(), values[jnp.argmax(here)].reshape(leaf.shape), leaf)

    def overwritten(slot, blocks):
        at = jnp.clip(index[slot] - start, 0, size - 1)
        before = jax.lax.dynamic_index_in_dim(blocks, at, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(
            blocks, jnp.where(here[slot], values[slot], before), at, axis=0
        )

    # Block by block and in place, where a scatter would write the leaf anew.
    blocks = leaf.reshape(-1, *leaf.shape[-2:])
    return jax.lax.fori_loop(0, len(values), overwritten, blocks).reshape(leaf.shape)
