"""A rule run on the coordinates of the gradient in a slowly changing subspace."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from .._core.checks import check_function, check_integer, check_matrix_leaf, check_rule
from .._core.guard import Guard
from .._core.keys import check_key, key_data, stream, streams
from .._core.measurements import Sketches
from .._core.trees import map_with_place, merge, places_of, split
from .._linalg.numerics import inverse
from .._matrices.listening import listener
from .._matrices.view import View, views_beside
from .._mesh.explicit import zeros
from .finders import SubspaceFinder, first_subspace
from .gradient import Energy, Held, Sketched
from .on_refresh import FOLLOWING, Carry, keep
from .residuals import Residual, Told, drop, stepping
from .switch import track_subspace


class LowRankState(NamedTuple):
    """State of `low_rank`; trees have holes (`optax.MaskedNode`) where a leaf is not projected."""

    count: Int[Array, ""]  # steps taken  # pyright: ignore[reportIncompatibleMethodOverride]
    refreshes: Int[Array, ""]  # subspaces found
    period: Int[Array, ""]  # steps between them: only `check_state` reads it
    key: UInt32[Array, "2"]  # raw threefry key data
    captured: Float[Array, ""]  # |PᵀG|²/|G|² of the last step, over all projected blocks
    projectors: Any  # a leaf (*, m, r) float32, orthonormal columns
    low: Any  # state of `inner` over (*, r, n) leaves
    full: Any  # state of `inner` over the unprojected leaves (*, m, n)
    outside: Any  # state of what becomes of the rest: of `residual`, where it is a rule; GUM's slots


def _captured(energies: Sequence[Energy]) -> Float[Array, ""]:
    """`Σ|PᵀG|² / Σ|G|²`, zero for zero gradients."""
    if not energies:
        return jnp.zeros((), jnp.float32)
    scale, inside, whole = (jnp.stack(x) for x in zip(*energies, strict=True))
    share = jnp.square(scale * inverse(scale.max()))
    return share @ inside * inverse(share @ whole)


def low_rank(
    inner: optax.GradientTransformation,
    rank: int,
    period: int,
    *,
    find_subspace: SubspaceFinder = track_subspace,
    carry: Carry = keep,
    residual: Residual = drop,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on the coordinates of the gradient in a slowly changing subspace.

        R = Pᵀ G,   S = inner(R),   step = P S  (+ residual),   P found anew every `period` steps

    A block with `min(m, n) <= rank` is not projected: `inner` runs on the full matrix and is never carried.

    Args:
      inner: the rule in the subspace, e.g. `optax.chain(optax.trace(0.95), orthogonalize())`. It is
        given no parameters: they live in the full space.
      rank: `r`, columns of the projector.
      period: `K`, steps between refreshes; the first step refreshes.
      find_subspace: `track_subspace`, `svd_subspace`, `random_subspace`, or any function
        `(key, gradient, previous) -> projector` with orthonormal columns; `switch_subspace` changes
        between two.
      carry: what happens to inner's state at a refresh: `keep`, `rotate` or `restart`.
      residual: what happens to the gradient outside the subspace: `drop`, `add_raw`, or any rule, whose
        step from `G - P R` is added: `normalize(jnp.sign)` is FRUGAL's, for instance. It is passed
        `coordinates` (R) and `steps` (S) as extra arguments.
      key: an integer seed or a JAX key, for finders that draw.

    Returns:
      A transformation over trees of `(*, m, n)` leaves, the side of size `m` projected, with state
      `LowRankState`: `r (m + n)` numbers a block where inner keeps one momentum.

    Raises:
      TypeError, ValueError: an argument or a leaf is out of range or of the wrong type.

    References:
      Zhao et al., GaLore, arXiv 2403.03507, Algorithm 2.
    """
    inner = optax.with_extra_args_support(check_rule("inner", inner))
    rank = check_integer("rank", rank, at_least=1)
    period = check_integer("period", period, at_least=1)
    check_function("find_subspace", find_subspace, "gum_optax.svd_subspace")
    check_function("carry", carry, "gum_optax.keep")
    check_key(key)
    subspace = Subspace(rank, period, find_subspace, carry, key)
    return in_subspace(inner, subspace, stepping(residual), lambda shape: min(shape) > rank)


class Subspace(NamedTuple):
    """The arguments of `low_rank` that say where the subspace comes from, checked."""

    rank: int
    period: int
    find: SubspaceFinder
    carry: Carry
    key: Any


def in_subspace(
    inner: optax.GradientTransformationExtraArgs,
    subspace: Subspace,
    step_from: optax.GradientTransformationExtraArgs,
    is_projected: Callable[[tuple[int, int]], bool],
) -> optax.GradientTransformationExtraArgs:
    """`low_rank` with any way of making the full-size step, and any choice of shapes that are projected.

    Args:
      inner: the rule in the subspace.
      subspace: where it comes from.
      step_from: from gradients to steps; its `update` takes `told`, a `Told`, besides.
      is_projected: of the shape `(m, n)` of a leaf's blocks.
    """
    _, period, find_subspace, carry, _ = subspace

    def split_by_shape(tree):
        return split(tree, [is_projected(leaf.shape[-2:]) for leaf in jax.tree.leaves(tree)])

    def init(params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            check_matrix_leaf(path, leaf)
        return _initial(inner, subspace, step_from, *split_by_shape(params))

    def update(
        updates, state, params=None, *, views=None, guard: Guard | None = None, sketches=None, **extra_args
    ):
        del params
        extra_args |= {"guard": guard}
        low, full = split_by_shape(updates)
        leaves, treedef = jax.tree.flatten(low)
        views, _ = split_by_shape(views_beside(updates, views))
        gradient = _gradient(low, jax.tree.leaves(views), sketches)
        due = jax.lax.rem(state.count, jnp.asarray(period, state.count.dtype)) == 0
        accepted = [jnp.asarray(True)] * len(leaves)
        if guard is not None:
            due, accepted = guard.due(due), guard.accepted(low)
        keys = streams(state.key, state.count // period, len(leaves))
        seen = gradient.seen(
            find_subspace, due, accepted, state.count, keys, jax.tree.leaves(state.projectors)
        )
        projectors, rotation, coordinates = (treedef.unflatten([x[i] for x in seen]) for i in range(3))
        if guard is not None:
            guard.as_kept(projectors)
        zeros_like_them = optax.tree.zeros_like(coordinates)
        inner_state = carry(inner, state.low, zeros_like_them, rotation, due)
        if guard is not None and carry not in FOLLOWING:
            inner_state = guard.carried(inner, inner_state, state.low, zeros_like_them)
        steps, inner_state = inner.update(coordinates, inner_state, None, **extra_args)
        # Measured before the steps are used: put off to the end, it would keep every leaf's coordinates.
        energies = [x.energy for x in seen]
        rows = zip(jax.tree.leaves(steps), energies, strict=True)
        rows = [jax.lax.optimization_barrier(row) for row in rows]
        steps = treedef.unflatten([step for step, _ in rows])
        told = Told(projectors, coordinates, steps, gradient, views, due, state.count, state.key)
        steps, outside_state = step_from.update(low, state.outside, None, **extra_args | {"told": told})
        full_steps, full_state = inner.update(as_float32(full), state.full, None, **extra_args)
        new_state = LowRankState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            refreshes=state.refreshes + due,
            period=state.period,
            key=state.key,
            captured=_captured([energy for _, energy in rows]),
            projectors=projectors,
            low=inner_state,
            full=full_state,
            outside=outside_state,
        )
        return merge(steps, full_steps), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _initial(
    inner: optax.GradientTransformationExtraArgs,
    subspace: Subspace,
    step_from: optax.GradientTransformationExtraArgs,
    low: Any,
    full: Any,
) -> LowRankState:
    """The state before the first step, which finds a subspace in place of the random one here."""
    data = key_data(subspace.key)
    if (heard := listener()) is not None:
        heard.ranks.append(subspace.rank)

    def start(place, g):
        return first_subspace(stream(data, jnp.int32(0), place), g, subspace.rank)

    coordinates = jax.tree.map(lambda g: zeros(g, subspace.rank, -1), low)
    inner_state = inner.init(coordinates)
    # A carry that does not fit inner says so here, and not at the first refresh.
    rotation = jax.tree.map(lambda r: zeros(r, subspace.rank, subspace.rank), coordinates)
    carried = functools.partial(subspace.carry, inner)
    jax.eval_shape(carried, inner_state, coordinates, rotation, True)
    return LowRankState(
        count=jnp.zeros((), jnp.int32),
        refreshes=jnp.zeros((), jnp.int32),
        period=jnp.asarray(subspace.period, jnp.int32),
        key=data,
        captured=jnp.zeros((), jnp.float32),
        projectors=map_with_place(start, low),
        low=inner_state,
        full=inner.init(float32_zeros(full)),
        outside=step_from.init(float32_zeros(low)),
    )


def _gradient(low: Any, views: Sequence[View], sketches: Sketches | None) -> Held | Sketched:
    """Of the projected leaves, from their updates or in place of them."""
    if sketches is not None:
        return Sketched(sketches, places_of(low), views)
    leaves = jax.tree.leaves(low)
    return Held([view.back(g) for g, view in zip(leaves, views, strict=True)], views)


def float32_zeros(tree: Any) -> Any:
    """What `inner.init` sees of unprojected leaves: its accumulators are float32 whatever the model is."""
    return jax.tree.map(lambda g: jnp.zeros_like(g, jnp.float32), tree)


def as_float32(tree: Any) -> Any:
    """What `inner.update` sees of unprojected leaves."""
    return jax.tree.map(lambda g: g.astype(jnp.float32), tree)
