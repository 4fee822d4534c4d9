"""How a slot is read and written.

GUM samples a few blocks and runs its rule on them at full rank. A block is a matrix: a leaf of the model, or
one matrix of a stack. All blocks of one shape form a group, over all leaves, and a group has a fixed number
of slots. The rule's state of the sampled blocks has the slots' shape, `(slots, m, n)`, so that it keeps its
size whichever blocks are sampled.

`Slots` has three verbs. An ordinary step uses each of them once; layer by layer, `SlotsInTurn` reads and
writes one slot at a time:

- `draw` says which blocks stand in the slots. It returns an index `(slots,)` for each group, which counts
  the blocks over the leaves of the group. The index follows from the key and the number of the period.
- `gather` reads the sampled blocks of the gradient, each with its projector, and makes the slots' inputs, as
  `gather.py` says.
- `scatter` writes the slots' steps over the sampled blocks of the low-rank step. It inverts the index:
  the slot of each block, or -1, tells each leaf what to read. A single matrix makes one choice. On a TPU a
  stack makes one choice for each slot, if the slots are few. Any other stack is overwritten in place.

The leaves of a group are never concatenated: a sampled block costs its own size and no more.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from .._core.batches import map_sequentially
from .._core.keys import draw
from .._core.trees import map_with_leaf_index
from .._core.xla import opaque_constants, rolled_but_on_tpu, wait_for
from .._linalg.orthonormal import lift
from .._mesh.explicit import zeros

# The sampled blocks of each group, by its name, counted over its leaves: {group: (slots,)}. No shape has a
# name in these annotations, because a name stands for one size, and groups differ.
Index = dict[str, Int[Array, "_"]]


class Group(NamedTuple):
    """The blocks of one shape; which leaves hold them, how many there are, how many get a slot."""

    name: str  # its shape, "64x256": stable across processes and the dtypes of gradients
    shape: tuple[int, int]
    leaf_indices: tuple[int, ...]  # of its leaves in the flattened tree
    sizes: tuple[int, ...]  # blocks of each of these leaves
    slots: int  # γ

    @property
    def blocks(self) -> int:
        """`L`."""
        return sum(self.sizes)

    @property
    def starts(self) -> tuple[int, ...]:
        """The number of each leaf's first block."""
        return tuple(sum(self.sizes[:i]) for i in range(len(self.sizes)))

    @property
    def fraction(self) -> float:
        """The realised `q`, `γ/L`."""
        return self.slots / self.blocks

    @property
    def is_full(self) -> bool:
        return self.slots == self.blocks


def groups_of(tree: Any, rank: int, fraction: float) -> dict[str, Group]:
    """Group the leaves of `tree` by the shape of their blocks.

    `slots = clip(round(fraction · L), 1, L)`, 0 when the fraction is 0; all `L` where `min(m, n) <= rank`.
    """
    members: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for leaf_index, leaf in enumerate(jax.tree.leaves(tree)):
        members.setdefault(leaf.shape[-2:], []).append((leaf_index, math.prod(leaf.shape[:-2])))
    groups = {}
    for shape, found in sorted(members.items()):
        leaf_indices, sizes = zip(*found, strict=True)
        total = sum(sizes)
        slots = min(max(round(fraction * total), 1), total) if fraction > 0 else 0
        if min(shape) <= rank:
            slots = total
        name = f"{shape[0]}x{shape[1]}"
        groups[name] = Group(name, shape, leaf_indices, sizes, slots)
    return groups


class Slots(NamedTuple):
    """The slots of all groups that have some."""

    groups: dict[str, Group]
    period: int  # steps between draws

    def draw(self, key: UInt32[Array, "2"], count: Int[Array, ""]) -> Index:
        """Which blocks stand in slots in the period of a step, without replacement."""
        return {
            name: draw(key, count // self.period, name, group.blocks, group.slots)
            for name, group in self.groups.items()
        }

    def zeros(self, tree: optax.Params) -> dict[str, Float[Array, "_ _ _"]]:
        """Empty slots, sharded as the blocks of the first leaf of their group are."""
        leaves = jax.tree.leaves(tree)
        return {
            name: zeros(leaves[group.leaf_indices[0]], -2, -1, group.slots)
            for name, group in self.groups.items()
        }

    def gather(
        self, index: Index, gradient: Any, projectors: Any, input_of: Callable[[Group], Callable[..., Array]]
    ) -> dict[str, Float[Array, "_ _ _"]]:
        """The slots' inputs: of each sampled block, a function of the gradient and the projector.

        Args:
          index: the sampled blocks.
          gradient: of the projected leaves, dense or known by projections.
          projectors: a tree with a leaf for each.
          input_of: the function, for a group.
        """
        leaves = jax.tree.leaves(projectors)
        return {
            name: gradient.slot_inputs(input_of(group), group, index[name], leaves)
            for name, group in self.groups.items()
        }

    def scatter(
        self, index: Index, values: dict[str, Float[Array, "_ _ _"]], projectors: Any, steps: Any
    ) -> Any:
        """`P S` of each leaf, with the slots' values in place of its sampled blocks.

        Args:
          index: the sampled blocks.
          values: of the slots, for each group.
          projectors: P.
          steps: S.
        """
        groups_of_leaves = self._groups_of_leaves(index)

        @jax.jit  # traced once for all leaves of a shape
        def overwritten(p, s, values, slot_of_block):
            # Lifted earlier, a leaf would be in memory while the slots make their steps.
            lifted = lift(*wait_for(values, (p, s)))
            step = scatter_blocks(lifted, values, slot_of_block)
            # The step overwrites a stack, which is then not in memory beside the step.
            return lifted if len(slot_of_block) == 1 else step, step

        def pair(leaf_index, p, s):
            """An array for which the next leaf waits, and the leaf."""
            if leaf_index not in groups_of_leaves:
                return (lift(p, s),) * 2
            name, slot_of_block = groups_of_leaves[leaf_index]
            return overwritten(p, s, values[name], slot_of_block)

        leaf_indices = map_with_leaf_index(lambda leaf_index, _: leaf_index, projectors)
        pairs = map_sequentially(pair, leaf_indices, projectors, steps)
        return jax.tree.map(lambda _, found: found[1], projectors, pairs)

    def _groups_of_leaves(self, index: Index) -> dict[int, tuple[str, Int[Array, "size"]]]:
        """By the index of a leaf that has slots: its group, and the slot of each of its blocks."""
        by_leaf = {}
        for name, group in self.groups.items():
            slot_of_block = slot_of_each_block(index[name], group.blocks)
            starts = opaque_constants(group.starts, slot_of_block[0])
            for leaf_index, start, size in zip(group.leaf_indices, starts, group.sizes, strict=True):
                by_leaf[leaf_index] = name, jax.lax.dynamic_slice_in_dim(slot_of_block, start, size)
        return by_leaf


# Up to this many slots are written into a stack by choices, each of which reads its slot once for every
# block. More slots are written one after the other, into a stack that is in memory for it. Any small number:
# the reads of the choices grow with it, and no memory does.
_FEW = 8


def _row(values: Float[Array, "slots *block"], number: Int[Array, ""]) -> Float[Array, "*block"]:
    """One row, or any row if the number is -1: unsigned, so that XLA does not count -1 from the end."""
    return jax.lax.dynamic_index_in_dim(values, number.astype(jnp.uint32), keepdims=False)


def slot_of_each_block(index: Int[Array, "slots"], blocks: int) -> Int[Array, "blocks"]:
    """The number of the slot that holds each block, -1 where none does."""
    return jnp.full(blocks, -1, jnp.int32).at[index].set(jnp.arange(len(index), dtype=jnp.int32))


def scatter_blocks(
    leaf: Float[Array, "... m n"], values: Float[Array, "slots m n"], slot_of_block: Int[Array, "size"]
) -> Float[Array, "... m n"]:
    """`leaf`, with `values[slot_of_block[i]]` in place of its block `i`, unless `slot_of_block[i]` is -1."""
    if len(slot_of_block) == 1:
        # A choice and no branch: XLA makes the choice where it next reads the leaf.
        value = _row(values, slot_of_block[0]).reshape(leaf.shape).astype(leaf.dtype)
        return jnp.where(slot_of_block[0] < 0, leaf, value)
    if len(values) > _FEW:
        return _sequentially(leaf, values, slot_of_block)
    return rolled_but_on_tpu(_sequentially, _by_choice, leaf, values, slot_of_block)


def _by_choice(leaf: Array, values: Array, slot_of_block: Array) -> Array:
    """A choice for each slot, so that a TPU never writes the leaf out."""
    for slot, value in enumerate(values.astype(leaf.dtype)):
        leaf = jnp.where((slot_of_block == slot).reshape(*leaf.shape[:-2], 1, 1), value, leaf)
    return leaf


def _sequentially(leaf: Array, values: Array, slot_of_block: Array) -> Array:
    """Writes block by block and in place; a scatter of XLA would copy the leaf."""

    def overwritten(slot, blocks):
        here = slot_of_block == slot
        at = jnp.argmax(here)
        before = jax.lax.dynamic_index_in_dim(blocks, at, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(
            blocks, jnp.where(here[at], values[slot].astype(leaf.dtype), before), at, axis=0
        )

    blocks = leaf.reshape(-1, *leaf.shape[-2:])
    return jax.lax.fori_loop(0, len(values), overwritten, blocks).reshape(leaf.shape)
