"""How the slots' inputs are read from the gradient.

Each result is a function of one sampled block and of its projector. `gather_by_slot` goes over the slots and
reads the leaf that holds the block. `gather_early` goes over the leaves, and copies what is sampled of each
into its slot, so that a gradient is used up before the next one is read. It is for groups whose leaves are
single matrices.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._core.xla import depend_on, opaque_constants, rolled_but_on_tpu
from .blocks import Member, read, with_small
from .slots import Group, slot_of_each_block


def gather_by_slot(
    f: Callable[..., Float[Array, "..."]], members: Sequence[Member], index: Int[Array, "slots"], group: Group
) -> Float[Array, "slots ..."]:
    """The results of `f` for the blocks at `index`, one block at a time."""
    starts = jnp.asarray(group.starts)

    @jax.jit  # traced once for all slots
    def one(i):
        leaf = jnp.searchsorted(starts, i, side="right", method="compare_all") - 1
        return f(*read(members, leaf, i - starts[leaf]))

    def unrolled(index):
        return jnp.stack([one(i) for i in index])

    return rolled_but_on_tpu(functools.partial(jax.lax.map, one), unrolled, index)


def gather_early(
    f: Callable[..., Float[Array, "m n"]], members: Sequence[Member], index: Int[Array, "slots"], group: Group
) -> Float[Array, "slots m n"]:
    """`gather_by_slot` for leaves of one block each, without branches.

    Each gradient is copied into its slot as soon as the backward pass has made it. `gather_by_slot` would
    read all slots' gradients at the end, when every gradient is in memory, and on a GPU each of its branches
    may wait for the host.
    """
    first = [member[0] for member in members]
    slot_of_block = slot_of_each_block(index, group.blocks)
    rows, columns = group.shape
    # With one slot, XLA would fuse all writes into one, which waits for all gradients; an extra row
    # prevents that.
    one_more = int(group.slots == 1)
    held = jnp.zeros((group.slots * rows + one_more, columns), jnp.float32)
    numbers = opaque_constants(range(len(first)), slot_of_block[0])
    # The backward pass begins with the last layers.
    for (leaf, view), number in reversed(list(zip(first, numbers, strict=True))):
        slot = jax.lax.dynamic_index_in_dim(slot_of_block, number, keepdims=False)
        at = slot.astype(jnp.uint32) * rows  # anywhere for -1
        before = jax.lax.dynamic_slice_in_dim(held, at, rows)
        block = view.of(leaf).reshape(group.shape).astype(jnp.float32)
        now = jnp.where(slot < 0, before, block)
        held = jax.lax.dynamic_update_slice_in_dim(held, now, at, 0)

    # The XLA of jax 0.12 would fuse the last write with what reads the slots, and hold a copy beside them.
    held = jax.lax.optimization_barrier(held)

    def looped(small_of, held):
        def one(slot, held):
            block = jax.lax.dynamic_slice_in_dim(held, slot * rows, rows)
            small = small_of(slot)
            # A CPU would copy the block out while the last refresh still needs its memory.
            found = f(depend_on(block, small[0]), *small)
            return jax.lax.dynamic_update_slice_in_dim(held, found, slot * rows, 0)

        return jax.lax.fori_loop(0, group.slots, one, held)

    held = with_small([member[1:] for member in members], index, looped, held)
    return held[: len(held) - one_more].reshape(group.slots, rows, columns)
