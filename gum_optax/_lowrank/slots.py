"""Groups of same-shaped blocks across leaves, and the few of them that stand in slots.

Full-size leaves are never concatenated: a slot is read by a branch on the leaf that holds its block,
and written back into the leaves that hold one.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._core.xla import rolled_but_on_tpu
from .._matrices.view import View


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

    `slots = clip(round(fraction · L), 1, L)`, 0 when the fraction is 0; all `L` where `min(m, n) <= rank`.
    """
    members: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for place, leaf in enumerate(jax.tree.leaves(tree)):
        members.setdefault(leaf.shape[-2:], []).append((place, math.prod(leaf.shape[:-2])))
    groups = {}
    for shape, found in sorted(members.items()):
        places, sizes = zip(*found, strict=True)
        total = sum(sizes)
        slots = min(max(round(fraction * total), 1), total) if fraction > 0 else 0
        if min(shape) <= rank:
            slots = total
        name = f"{shape[0]}x{shape[1]}"
        groups[name] = Group(name, shape, places, sizes, slots)
    return groups


# So many slots go into a stack by choices, each of which reads its slot once a block; more go in one after
# the other, into a stack that is written out for it.
_FEW = 8

# The arrays to read of one leaf, as they are stored, each with its view.
Member = Sequence[tuple[Array, View]]


def read(
    members: Sequence[Member], leaf: Int[Array, ""], number: Int[Array, ""]
) -> list[Float[Array, "m n"]]:
    """Block `number` of one of several leaves, of each of its arrays, in float32.

    The views of all members show blocks of the same shapes.
    """
    are_stacks = all(math.prod(view.shape[:-2]) > 1 for member in members for _, view in member)
    return (_sliced if are_stacks else _branched)(members, leaf, number)


def _sliced(members: Sequence[Member], leaf: Any, number: Any) -> list[Array]:
    """A block of every stack, and a choice of one: in a branch, a TPU would copy the stack to turn it."""
    blocks = [[view.block(x, number).astype(jnp.float32) for x, view in member] for member in members]
    found = blocks[0]
    for place, others in enumerate(blocks[1:], 1):
        found = [jnp.where(leaf == place, b, a) for a, b in zip(found, others, strict=True)]
    return found


def _branched(members: Sequence[Member], leaf: Any, number: Any) -> list[Array]:
    """A branch for every leaf: of many leaves, only the one that holds the block is read."""

    @functools.partial(jax.jit, static_argnums=0)  # traced once for all leaves seen the same way
    def flat(view, x, number):
        # Behind a barrier, or XLA would move the view out of the branch, and copy every leaf. Flat, so that
        # all branches give the block in one layout.
        return view.block(jax.lax.optimization_barrier(x), number).astype(jnp.float32).ravel()

    def reader(member):
        return lambda number: [flat(view, x, number) for x, view in member]

    found = jax.lax.switch(leaf, [reader(member) for member in members], number)
    return [x.reshape(view.shape[-2:]) for x, (_, view) in zip(found, members[0], strict=True)]


def map_blocks(
    f: Callable[..., Float[Array, "..."]], members: Sequence[Member], index: Int[Array, "k"], group: Group
) -> Float[Array, "k ..."]:
    """`f` of the blocks at `index`, counted over the group's leaves, one at a time."""
    starts = jnp.asarray(group.starts)

    @jax.jit  # traced once for all slots
    def one(i):
        leaf = jnp.searchsorted(starts, i, side="right") - 1
        return f(*read(members, leaf, i - starts[leaf]))

    def unrolled(index):
        return jnp.stack([one(i) for i in index])

    return rolled_but_on_tpu(functools.partial(jax.lax.map, one), unrolled, index)


def map_held_blocks(
    f: Callable[..., Float[Array, "m n"]], members: Sequence[Member], index: Int[Array, "k"], group: Group
) -> Float[Array, "k m n"]:
    """`map_blocks` for a CPU and leaves of one block each, whose first arrays need not be in memory together.

    Each gradient is copied into its slot as soon as the backward pass has made it. `map_blocks` would read
    the slots' gradients at once, when all of them are in memory.
    """
    first = [member[0] for member in members]
    slots = holders(index, group.blocks)
    rows, columns = group.shape
    # With one slot, XLA would fuse all writes into one that waits for all gradients; an extra row prevents
    # that.
    one_more = int(group.slots == 1)
    held = jnp.zeros((group.slots * rows + one_more, columns), jnp.float32)
    for place in reversed(range(len(first))):  # the backward pass begins with the last layers
        leaf, view = first[place]
        at = slots[place].astype(jnp.uint32) * rows  # anywhere for -1
        before = jax.lax.dynamic_slice_in_dim(held, at, rows)
        block = view.of(leaf).reshape(group.shape).astype(jnp.float32)
        now = jnp.where(slots[place] < 0, before, block)
        held = jax.lax.dynamic_update_slice_in_dim(held, now, at, 0)
    others = [member[1:] for member in members]

    def one(slot, held):
        block = jax.lax.dynamic_slice_in_dim(held, slot * rows, rows)
        found = f(block, *read(others, index[slot], jnp.int32(0)))
        return jax.lax.dynamic_update_slice_in_dim(held, found, slot * rows, 0)

    held = jax.lax.fori_loop(0, group.slots, one, held)
    return held[: len(held) - one_more].reshape(group.slots, rows, columns)


def _row(values: Float[Array, "k *block"], number: Int[Array, ""]) -> Float[Array, "*block"]:
    """One of them, or any where the number is -1; unsigned, so that XLA does not count that from the end."""
    return jax.lax.dynamic_index_in_dim(values, number.astype(jnp.uint32), keepdims=False)


def holders(index: Int[Array, "k"], blocks: int) -> Int[Array, "blocks"]:
    """The number of the slot that holds each block, -1 where none does."""
    return jnp.full(blocks, -1, jnp.int32).at[index].set(jnp.arange(len(index), dtype=jnp.int32))


def put(
    leaf: Float[Array, "... m n"], values: Float[Array, "k m n"], slots: Int[Array, "size"]
) -> Float[Array, "... m n"]:
    """`leaf`, with `values[slots[i]]` in place of its block `i` where that is not -1."""
    if len(slots) == 1:
        # A choice and no branch: it is made where the leaf is next read.
        held = _row(values, slots[0]).reshape(leaf.shape).astype(leaf.dtype)
        return jnp.where(slots[0] < 0, leaf, held)
    if len(values) > _FEW:
        return _in_turn(leaf, values, slots)
    return rolled_but_on_tpu(_in_turn, _by_choice, leaf, values, slots)


def _by_choice(leaf: Array, values: Array, slots: Array) -> Array:
    """As a single block, once for each slot: on a TPU the leaf is then never written out."""
    for slot, value in enumerate(values.astype(leaf.dtype)):
        leaf = jnp.where((slots == slot).reshape(*leaf.shape[:-2], 1, 1), value, leaf)
    return leaf


def _in_turn(leaf: Array, values: Array, slots: Array) -> Array:
    """Block by block and in place, where a scatter would write the leaf anew."""

    def overwritten(slot, blocks):
        here = slots == slot
        at = jnp.argmax(here)
        before = jax.lax.dynamic_index_in_dim(blocks, at, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(
            blocks, jnp.where(here[at], values[slot].astype(leaf.dtype), before), at, axis=0
        )

    blocks = leaf.reshape(-1, *leaf.shape[-2:])
    return jax.lax.fori_loop(0, len(values), overwritten, blocks).reshape(leaf.shape)
