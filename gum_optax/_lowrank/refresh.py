"""Reads each leaf's gradient once: finds a new projector at a refresh, and projects."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from .._core.batches import cut, same_shape_groups
from .._core.keys import some, typed
from .._core.measurements import MeanOf
from .._core.xla import in_one, unstacked
from .._linalg.numerics import exact_matmul
from .._linalg.orthonormal import project
from .._matrices.view import View, plain_view
from .blocks import Member, read
from .energy import Energy, squares
from .finders import LinearForm, SubspaceFinder
from .projectors import ProjectorStorage, Stored
from .switch import few_finders_of, finders_of

# A leaf's gradient as it is stored, its view as blocks, and its projector as that is stored.
Row = tuple[Float[Array, "..."], View, Stored]
# A leaf's new projector, and the rotation `P_newᵀ P_old` into it.
Found = tuple[Float[Array, "*b m r"], Float[Array, "*b r r"]]

# On a CPU this many loops, or up to twice as many, read the leaves of one shape. At most an eighth of the
# gradients then waits for the last gradient of its loop, and the number of finders that XLA compiles does not
# grow with the number of layers. Measured for `gum`, 56 leaves of two shapes: 30,349 lines of compiled text,
# and 36,000 with twelve to thirty loops.
_LOOPS = 8


class Projection(NamedTuple):
    """A leaf's gradient in the subspace."""

    projector: Float[Array, "*b m r"]  # P
    rotation: Float[Array, "*b r r"]  # from the previous projector
    coordinates: Float[Array, "*b r n"]  # R = PᵀG
    energy: Energy


def _projection(g: Array, stored: Array, p: Array, rotation: Array) -> Projection:
    r = project(p, g)
    scale = jnp.max(jnp.abs(r))
    # The sum reads the gradient as it is stored: XLA would write out another view to sum it.
    return Projection(p, rotation, r, Energy(scale, squares(r, scale), squares(stored, scale)))


def projections_of_leaves(
    find: SubspaceFinder,
    is_refresh: Bool[Array, ""],
    count: Int[Array, ""],
    keys: Key[Array, "leaves"],
    rows: Sequence[Row],
    storage: ProjectorStorage,
) -> list[Projection]:
    """The projection of each leaf, on a new projector at a refresh.

    A loop reads single blocks of one shape one after the other, so that XLA compiles the finder once for all
    of them; a stack has a branch of its own. On a CPU a loop reads only a few leaves, and one conditional
    holds the loop and the projections of these leaves: their gradients are freed soon after the backward pass
    has made them. On a TPU a loop reads one leaf, because XLA would move the conversion of all leaves to
    bfloat16 out of the loop. On a GPU one conditional holds all refreshes, because each conditional may wait
    for the host.

    Args:
      find: the finder, or several that follow each other.
      is_refresh: whether this step begins a period.
      count: steps before this one.
      keys: a key for each leaf.
      rows: the leaves.
      storage: of the projectors, which are loaded where they are read, so that memory holds few of them.
    """
    (forms, phase), (few, _) = finders_of(find, count), few_finders_of(find, count)
    stored = [first for *_, (first, *_) in rows]
    groups = same_shape_groups(
        stored, [(p.shape, view.shape[-1]) for p, (_, view, _) in zip(stored, rows, strict=True)]
    )
    # Jitted, so that leaves with the same views are traced once.
    reader_of = functools.cache(
        lambda forms, views: jax.jit(
            functools.partial(_projections, forms, storage, views, [range(len(views))])
        )
    )

    def in_groups(forms, size_of):
        results: dict[int, Any] = {}
        for group in groups:
            for leaf_indices in cut(group, size_of(len(group))):
                read_them = reader_of(forms, tuple(rows[i][1] for i in leaf_indices))
                leaves = [(rows[i][0], rows[i][2]) for i in leaf_indices]
                chosen = some(keys, leaf_indices)
                of_them = in_one(read_them, is_refresh, phase, chosen, leaves)
                results |= dict(zip(leaf_indices, of_them, strict=True))
        return [results[i] for i in range(len(rows))]

    def all_groups():
        # A loop over leaves of two layouts would copy those of one, and hold all copies. So single matrices
        # enter as they are viewed: the product that makes a gradient writes it in either layout.
        looped = {i for group in groups if len(group) > 1 for i in group}
        seen = [(view.of(g) if i in looped else g, p) for i, (g, view, p) in enumerate(rows)]
        views = [plain_view(g) if i in looped else rows[i][1] for i, (g, _) in enumerate(seen)]
        return _projections(few, storage, views, groups, is_refresh, phase, keys, seen)

    return jax.lax.platform_dependent(
        cpu=lambda: in_groups(few, lambda size: size // _LOOPS if size > 2 * _LOOPS else 1),
        tpu=lambda: in_groups(forms, lambda size: 1),
        default=all_groups,
    )


def _projections(
    forms: Sequence[LinearForm],
    storage: ProjectorStorage,
    views: Sequence[View],
    groups: Sequence[Sequence[int]],
    is_refresh: Bool[Array, ""],
    phase: Int[Array, ""],
    keys: Key[Array, "leaves"],
    stored: Sequence[tuple[Array, Stored]],
) -> list[Projection]:
    """The projections of some leaves, in one conditional; each group is the indices of one shape."""
    leaves = [(g, storage.load(*of_projector)) for g, of_projector in stored]

    def refreshing(phase, keys, leaves):
        found: dict[int, Found] = {}
        for group in groups:
            refresh = _sequentially if len(group) > 1 else _alone
            own_keys = some(keys, group)
            of_group = refresh(forms, [views[i] for i in group], phase, own_keys, [leaves[i] for i in group])
            found |= dict(zip(group, of_group, strict=True))
        return [found[i] for i in range(len(leaves))]

    def staying(phase, keys, leaves):
        del phase, keys
        return unchanged([p for _, p in leaves])

    found = jax.lax.cond(is_refresh, refreshing, staying, phase, keys, leaves)
    return [
        _projection(view.of(g), g, *pair) for view, (g, _), pair in zip(views, leaves, found, strict=True)
    ]


def _alone(forms: Any, views: Any, phase: Any, keys: Any, leaves: Any) -> list[Found]:
    """Refreshes one leaf, all its blocks at once."""
    ((stored, p),), (view,) = leaves, views

    def mean_of(f, *operands):
        # The barrier stands before the view: without it XLA would move the view out of the branch, or out of
        # a loop in it, and copy the gradient on every step.
        g, operands = jax.lax.optimization_barrier((stored, operands))
        return f([view.of(g)], *operands)

    return found_by(forms, phase, mean_of, [keys[0]], [p])


def _sequentially(forms: Any, views: Any, phase: Any, keys: Any, leaves: Any) -> list[Found]:
    """Refreshes one leaf after the other."""
    members: list[Member] = [
        ((g, view), (p, plain_view(p))) for (g, p), view in zip(leaves, views, strict=True)
    ]
    batch = leaves[0][1].shape[:-2]

    def one(row):
        member, data = row
        g, p = (x.reshape(*batch, *x.shape) for x in read(members, member, jnp.int32(0)))

        def mean_of(f, *operands):
            return f([g], *operands)

        return found_by(forms, phase, mean_of, [typed(data)], [p])[0]

    # The keys travel as data: `jax_debug_key_reuse` takes a loop over keys for a use of all in each row.
    projectors, rotations = jax.lax.map(one, (jnp.arange(len(leaves)), jax.random.key_data(keys)))
    return [(p, rotation) for p, rotation in unstacked(projectors, rotations)]


def found_by(
    forms: Sequence[LinearForm],
    phase: Int[Array, ""],
    mean_of: MeanOf,
    keys: Sequence[Any],
    projectors: Sequence[Float[Array, "*b m r"]],
) -> list[Found]:
    """New projectors by the finder of this phase."""

    def find(form, projectors):
        news = form(mean_of, list(keys), projectors)
        for new, p in zip(news, projectors, strict=True):
            if jnp.shape(new) != p.shape:
                raise ValueError(
                    "find_subspace must return a projector of the shape of its argument previous,"
                    f" {p.shape}, got {jnp.shape(new)}."
                )
        return [_with_rotation(new.astype(p.dtype), p) for new, p in zip(news, projectors, strict=True)]

    branches = [functools.partial(find, form) for form in forms]
    return jax.lax.switch(phase, branches, list(projectors))


def refreshed_by_means(
    find: SubspaceFinder,
    is_refresh: Bool[Array, ""],
    count: Int[Array, ""],
    keys: Sequence[Any],
    mean_of: MeanOf,
    projectors: Sequence[Float[Array, "*b m r"]],
) -> list[Found]:
    """The refresh of gradients that nobody forms; all leaves at once, so that they share each mean."""
    forms, phase = few_finders_of(find, count)

    def refreshing(projectors):
        return found_by(forms, phase, mean_of, keys, projectors)

    return jax.lax.cond(is_refresh, refreshing, unchanged, list(projectors))


def unchanged(projectors: Sequence[Float[Array, "*b m r"]]) -> list[Found]:
    """The projectors as they were, and rotations by nothing."""
    return [(p, no_rotation(p)) for p in projectors]


def no_rotation(p: Float[Array, "*b m r"]) -> Float[Array, "*b r r"]:
    """The identity."""
    return jnp.broadcast_to(jnp.eye(p.shape[-1], dtype=p.dtype), (*p.shape[:-2], *p.shape[-1:] * 2))


def _with_rotation(new: Any, p: Any) -> Found:
    return new, exact_matmul(new.mT, p)
