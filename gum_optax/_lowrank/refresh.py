"""The refresh: a new projector for every leaf at the start of a period."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from .._core.keys import some, typed
from .._core.measurements import MeanOf
from .._core.xla import after, companions, rolled_but_on_tpu, unstacked
from .._linalg.numerics import exact_matmul
from .._matrices.view import View, plain_view
from .finders import SubspaceFinder, by_means
from .slots import Member, read
from .switch import finders_of

# A leaf's gradient as it is stored, how that is seen as blocks, and its projector.
Row = tuple[Float[Array, "..."], View, Float[Array, "*b m r"]]
# Its new projector, and the rotation `P_newᵀ P_old` into it.
Found = tuple[Float[Array, "*b m r"], Float[Array, "*b r r"]]


def refreshed(
    find: SubspaceFinder,
    due: Sequence[Bool[Array, ""]],
    count: Int[Array, ""],
    keys: Key[Array, "leaves"],
    rows: Sequence[Row],
) -> list[Found]:
    """The projector of the new period for each leaf where one is due, and the rotation into it.

    Leaves that are one block each, of one shape, take turns in one loop, so that XLA compiles the finder
    once for all of them; a leaf that is a stack has a branch of its own. Gradients go into a branch as they
    are stored: seen another way, they would be copied, period or not.

    Args:
      find: the finder, or several that follow each other.
      due: whether this step begins a period, for each leaf: not for one that does not step.
      count: steps before this one.
      keys: one a leaf.
      rows: the leaves.
    """
    finders, phase = finders_of(find, count)
    groups = companions([p for *_, p in rows], [(p.shape, view.shape[-1]) for _, view, p in rows])
    found: dict[int, Found] = {}
    for places in groups:
        members = [rows[place] for place in places]
        operands = some(keys, places), phase, [(g, p) for g, _, p in members]
        dues = [due[place] for place in places]
        each = functools.partial(_each(finders, members), dues)
        if len(members) > 1:
            flags = jnp.stack(dues)
            loop = functools.partial(jax.lax.cond, flags.any(), _in_turn(finders, members, flags), _stayed)
            results = rolled_but_on_tpu(loop, each, *operands)
        else:
            results = each(*operands)
        found |= dict(zip(places, results, strict=True))
    return [found[place] for place in range(len(rows))]


def refreshed_by_means(
    find: SubspaceFinder,
    due: Bool[Array, ""],
    count: Int[Array, ""],
    keys: Sequence[Any],
    mean_of: MeanOf,
    projectors: Sequence[Float[Array, "*b m r"]],
) -> list[Found]:
    """As `refreshed`, of gradients that nobody holds; all leaves at once, so that they share each mean."""
    finders, phase = finders_of(find, count)
    branches = [functools.partial(_found_by_means, finder, keys, mean_of) for finder in finders]
    return jax.lax.cond(due, lambda p: jax.lax.switch(phase, branches, p), stayed, list(projectors))


def stayed(projectors: Sequence[Float[Array, "*b m r"]]) -> list[Found]:
    """The projectors of before, and no rotation."""

    def eye(p):
        return jnp.broadcast_to(jnp.eye(p.shape[-1], dtype=p.dtype), (*p.shape[:-2], *p.shape[-1:] * 2))

    return [(p, eye(p)) for p in projectors]


def _stayed(keys: Any, phase: Any, operands: Any) -> list[Found]:
    del keys, phase
    return stayed([p for _, p in operands])


def _with_rotation(new: Any, p: Any) -> Found:
    return new, exact_matmul(new.mT, p)


def _found(find: SubspaceFinder, key: Any, g: Any, p: Any) -> Found:
    return _with_rotation(find(key, g, p).astype(p.dtype), p)


def _found_by_means(
    find: SubspaceFinder, keys: Sequence[Any], mean_of: MeanOf, projectors: Sequence[Any]
) -> list[Found]:
    found = by_means(find)(list(keys), mean_of, list(projectors))
    return [_with_rotation(new.astype(p.dtype), p) for new, p in zip(found, projectors, strict=True)]


def _each(finders: Sequence[SubspaceFinder], rows: Sequence[Row]):
    """A branch for each leaf, all blocks of it at once."""

    def by(find, view, key, stored, p):
        # The barrier keeps XLA from moving the view out of the branch again.
        new, rotation = _found(find, key, view.of(jax.lax.optimization_barrier(stored)), p)
        # The new one takes the place of the old, which the rotation reads: first the rotation.
        return after(new, rotation), rotation

    def found(view, keys, phase, operands):
        branches = [functools.partial(by, find, view) for find in finders]
        return [jax.lax.switch(phase, branches, keys[0], *operands[0])]

    def one(view, due, *operands):
        return jax.lax.cond(due, functools.partial(found, view), _stayed, *operands)[0]

    # Jitted, so that a view is traced once for all leaves that share it.
    one_by = {view: jax.jit(functools.partial(one, view)) for _, view, _ in rows}

    def each(dues, keys, phase, operands):
        return [
            one_by[view](due, keys[i : i + 1], phase, [operand])
            for i, (due, (_, view, _), operand) in enumerate(zip(dues, rows, operands, strict=True))
        ]

    return each


def _in_turn(finders: Sequence[SubspaceFinder], rows: Sequence[Row], flags: Bool[Array, "leaves"]):
    """One leaf after the other, each by the finder of the phase, where its flag is set."""
    views = [view for _, view, _ in rows]

    def found(keys, phase, operands):
        members: list[Member] = [
            ((g, view), (p, plain_view(p))) for (g, p), view in zip(operands, views, strict=True)
        ]
        batch = operands[0][1].shape[:-2]

        def one(turn):
            place, data, due = turn
            g, p = read(members, place, jnp.int32(0))
            block = typed(data), g.reshape(*batch, *g.shape), p.reshape(*batch, *p.shape)
            branches = [functools.partial(_found, find) for find in finders]
            which = jnp.where(due, phase, len(branches))
            return jax.lax.switch(which, [*branches, lambda _, __, p: stayed([p])[0]], *block)

        # As data: `jax_debug_key_reuse` takes a loop over keys for a use of all in each turn.
        turns = jnp.arange(len(rows)), jax.random.key_data(keys), flags
        projectors, rotations = jax.lax.map(one, turns)
        return unstacked(projectors, rotations)

    return found
