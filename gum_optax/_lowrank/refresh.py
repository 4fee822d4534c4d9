"""A look at each leaf's gradient: a new projector at the start of a period, and what is made of the two."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from .._core.keys import some, typed
from .._core.measurements import MeanOf
from .._core.xla import companions, in_one, unstacked
from .._linalg.numerics import exact_matmul
from .._matrices.view import View, plain_view
from .blocks import Member, read
from .finders import LinearForm, SubspaceFinder
from .switch import finders_of

# A leaf's gradient as it is stored, how that is seen as blocks, and its projector.
Row = tuple[Float[Array, "..."], View, Float[Array, "*b m r"]]
# Its new projector, and the rotation `P_newᵀ P_old` into it.
Found = tuple[Float[Array, "*b m r"], Float[Array, "*b r r"]]

# On a CPU, the leaves of one shape are read by this many loops, or by up to twice as many. At most an eighth
# of their gradients then waits for the last gradient of its loop, and the number of finders that XLA compiles
# does not grow with the number of layers. Measured for `gum`, 56 leaves of two shapes: 30,349 lines of
# compiled text, and 36,000 with twelve to thirty loops.
_LOOPS = 8


def refreshed(
    find: SubspaceFinder,
    due: Bool[Array, ""],
    count: Int[Array, ""],
    keys: Key[Array, "leaves"],
    rows: Sequence[Row],
    then: Callable[..., Any],
) -> list[Any]:
    """`then(gradient, as it is stored, projector, rotation)` of each leaf, after a refresh where one is due.

    Single blocks of one shape take turns in a loop, so that XLA compiles the finder once for all of them; a
    stack has a branch of its own. On a CPU a loop takes only a few leaves, and stands in one conditional with
    all that is made of their gradients: the gradients are freed soon after the backward pass has made them.
    On a TPU a loop takes one leaf, because XLA would move the conversion of all leaves to bfloat16 out of it.

    Args:
      find: the finder, or several that follow each other.
      due: whether this step begins a period.
      count: steps before this one.
      keys: one a leaf.
      rows: the leaves.
      then: what is made of a leaf.
    """
    forms, phase = finders_of(find, count)
    groups = companions([p for *_, p in rows], [(p.shape, view.shape[-1]) for _, view, p in rows])
    # Jitted, so that leaves seen the same way are traced once.
    look_at = functools.cache(lambda views: jax.jit(functools.partial(_look, forms, then, views)))

    def by(size_of, wrap):
        seen: dict[int, Any] = {}
        for group in groups:
            for places in _cut(group, size_of(len(group))):
                look = look_at(tuple(rows[place][1] for place in places))
                leaves = [(rows[place][0], rows[place][2]) for place in places]
                of_them = wrap(look, due, phase, some(keys, places), leaves)
                seen |= dict(zip(places, of_them, strict=True))
        return [seen[place] for place in range(len(rows))]

    def once(look, *operands):
        return in_one(look, count >= 0, *operands)

    def plainly(look, *operands):
        return look(*operands)

    return jax.lax.platform_dependent(
        cpu=lambda: by(lambda size: max(size // _LOOPS, 1), once),
        tpu=lambda: by(lambda size: 1, plainly),
        default=lambda: by(lambda size: size, plainly),
    )


def _cut(places: Sequence[int], size: int) -> list[Sequence[int]]:
    """Into pieces of so many, or fewer."""
    return [places[start : start + size] for start in range(0, len(places), size)]


def _look(
    forms: Sequence[LinearForm],
    then: Callable[..., Any],
    views: Sequence[View],
    due: Bool[Array, ""],
    phase: Int[Array, ""],
    keys: Key[Array, "leaves"],
    leaves: Sequence[tuple[Array, Array]],
) -> list[Any]:
    """Some leaves of one shape."""

    def refreshing(phase, keys, leaves):
        refresh = _in_turn if len(leaves) > 1 else _alone
        return refresh(forms, views, phase, keys, leaves)

    def staying(phase, keys, leaves):
        del phase, keys
        return stayed([p for _, p in leaves])

    found = jax.lax.cond(due, refreshing, staying, phase, keys, leaves)
    return [then(view.of(g), g, *pair) for view, (g, _), pair in zip(views, leaves, found, strict=True)]


def _alone(forms: Any, views: Any, phase: Any, keys: Any, leaves: Any) -> list[Found]:
    """One leaf, all blocks of it at once."""
    ((stored, p),), (view,) = leaves, views

    def mean_of(f, *operands):
        # As it is stored, and behind a barrier: seen another way outside of the branch, or of a loop in it,
        # the gradient would be copied, period or not.
        g, operands = jax.lax.optimization_barrier((stored, operands))
        return f([view.of(g)], *operands)

    return found_by(forms, phase, mean_of, [keys[0]], [p])


def _in_turn(forms: Any, views: Any, phase: Any, keys: Any, leaves: Any) -> list[Found]:
    """One leaf after the other."""
    members: list[Member] = [
        ((g, view), (p, plain_view(p))) for (g, p), view in zip(leaves, views, strict=True)
    ]
    batch = leaves[0][1].shape[:-2]

    def one(turn):
        place, data = turn
        g, p = (x.reshape(*batch, *x.shape) for x in read(members, place, jnp.int32(0)))

        def mean_of(f, *operands):
            return f([g], *operands)

        return found_by(forms, phase, mean_of, [typed(data)], [p])[0]

    # As data: `jax_debug_key_reuse` takes a loop over keys for a use of all in each turn.
    projectors, rotations = jax.lax.map(one, (jnp.arange(len(leaves)), jax.random.key_data(keys)))
    return [(p, rotation) for p, rotation in unstacked(projectors, rotations)]


def found_by(
    forms: Sequence[LinearForm],
    phase: Int[Array, ""],
    mean_of: MeanOf,
    keys: Sequence[Any],
    projectors: Sequence[Float[Array, "*b m r"]],
) -> list[Found]:
    """New projectors by the finder of the phase."""

    def by(form, projectors):
        news = form(mean_of, list(keys), projectors)
        return [_with_rotation(new.astype(p.dtype), p) for new, p in zip(news, projectors, strict=True)]

    branches = [functools.partial(by, form) for form in forms]
    return jax.lax.switch(phase, branches, list(projectors))


def refreshed_by_means(
    find: SubspaceFinder,
    due: Bool[Array, ""],
    count: Int[Array, ""],
    keys: Sequence[Any],
    mean_of: MeanOf,
    projectors: Sequence[Float[Array, "*b m r"]],
) -> list[Found]:
    """As `refreshed`, of gradients that nobody holds; all leaves at once, so that they share each mean."""
    forms, phase = finders_of(find, count)

    def refreshing(projectors):
        return found_by(forms, phase, mean_of, keys, projectors)

    return jax.lax.cond(due, refreshing, stayed, list(projectors))


def stayed(projectors: Sequence[Float[Array, "*b m r"]]) -> list[Found]:
    """The projectors of before, and no rotation."""

    def eye(p):
        return jnp.broadcast_to(jnp.eye(p.shape[-1], dtype=p.dtype), (*p.shape[:-2], *p.shape[-1:] * 2))

    return [(p, eye(p)) for p in projectors]


def _with_rotation(new: Any, p: Any) -> Found:
    return new, exact_matmul(new.mT, p)
