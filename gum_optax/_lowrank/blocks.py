"""One block of several leaves, read without the others.

A block is a matrix of a leaf. Full-size leaves are never concatenated: several stacks are sliced each, and of
single matrices only the one that holds the block is read, in a branch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._matrices.view import View

# The arrays of one leaf as they are stored, each with its view.
Member = Sequence[tuple[Array, View]]


def read(
    members: Sequence[Member], leaf: Int[Array, ""], number: Int[Array, ""]
) -> list[Float[Array, "m n"]]:
    """Block `number` of each array of one of several leaves, in float32.

    All members have the same number of arrays, and their views show blocks of the same shapes.
    """
    are_stacks = all(math.prod(view.shape[:-2]) > 1 for member in members for _, view in member)
    return (_sliced if are_stacks else _branched)(members, leaf, number)


def _sliced(members: Sequence[Member], leaf: Any, number: Any) -> list[Array]:
    """Slices every stack and chooses a block: in a branch, a TPU would copy a stack to transpose it."""
    blocks = [[view.block(x, number).astype(jnp.float32) for x, view in member] for member in members]
    found = blocks[0]
    for other, others in enumerate(blocks[1:], 1):
        found = [jnp.where(leaf == other, b, a) for a, b in zip(found, others, strict=True)]
    return found


def _branched(members: Sequence[Member], leaf: Any, number: Any) -> list[Array]:
    """A branch for every leaf: only the leaf that holds the block is read."""

    @functools.partial(jax.jit, static_argnums=0)  # traced once for all leaves with the same view
    def flat(view, x, number):
        # The barrier keeps XLA from moving the view out of the branch, where it would copy every leaf. The
        # block is flat, so that all branches return it in one layout.
        return view.block(jax.lax.optimization_barrier(x), number).astype(jnp.float32).ravel()

    def reader(member):
        return lambda number: [flat(view, x, number) for x, view in member]

    found = jax.lax.switch(leaf, [reader(member) for member in members], number)
    return [x.reshape(view.shape[-2:]) for x, (_, view) in zip(found, members[0], strict=True)]


def with_small(
    members: Sequence[Member], index: Int[Array, "slots"], f: Callable[..., Array], *operands: Array
) -> Array:
    """`f(small_of, *operands)`, where `small_of(slot)` reads the block at `index[slot]` of small leaves.

    Each leaf is one block, and each of its arrays becomes an array in float32. A CPU reads the one leaf.
    Elsewhere all leaves are stacked, because each branch may wait for the host.
    """

    def one_by_one(*operands):
        return f(lambda slot: read(members, index[slot], jnp.int32(0)), *operands)

    def stacked(*operands):
        blocks = [[view.block(x, jnp.int32(0)) for x, view in member] for member in members]
        rows = [jnp.stack(arrays)[index].astype(jnp.float32) for arrays in zip(*blocks, strict=True)]
        return f(lambda slot: [x[slot] for x in rows], *operands)

    return jax.lax.platform_dependent(*operands, cpu=one_by_one, default=stacked)
