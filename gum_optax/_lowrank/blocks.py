"""One block of several leaves, read without the others.

A block is a matrix of a leaf. Full-size leaves are never concatenated: several stacks are sliced each, and of
single matrices only the one that holds the block is read, in a branch.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._matrices.view import View

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
