"""A rule run on the coordinates of the gradient in a slowly changing subspace."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt32

from .._core.acceptance import Acceptance
from .._core.checks import check_function, check_integer, check_matrix_leaf, check_rule, renamed_argument
from .._core.context import NO_CONTEXT, MatrixContext
from .._core.full_shapes import coordinates_of
from .._core.keys import check_key, key_data, stream
from .._core.trees import map_with_leaf_index, merge, split
from .._matrices.listening import listener
from .._matrices.view import views_beside
from .._mesh.explicit import zeros
from .energy import captured_share
from .finders import SubspaceFinder, first_subspace
from .on_refresh import FOLLOWING, OnRefresh, keep
from .plan import LowRankStep, Plan
from .projections import (
    Projections,
    Subspace,
    accepted_by,
    begins_period,
    gradient_of,
    measured_before,
    projections_of,
    stored_projectors,
    trees_of_stored,
)
from .projectors import ProjectorStorage, projector_storage
from .residuals import Residual, drop, lift_with
from .switch import track_subspace


class LowRankState(NamedTuple):
    """State of `low_rank`; a leaf that is not projected is masked (`optax.MaskedNode`).

    Examples:
      >>> rule = gum_optax.low_rank(optax.trace(0.9), rank=2, period=200)
      >>> state = rule.init({"kernel": jnp.ones((4, 8))})
      >>> state.projectors["kernel"].shape, state.low.trace["kernel"].shape
      ((4, 2), (2, 8))
    """

    count: Int[Array, ""]  # steps taken  # pyright: ignore[reportIncompatibleMethodOverride]
    refreshes: Int[Array, ""]  # subspaces found
    period: Int[Array, ""]  # steps between them: only `check_state` reads it
    key: UInt32[Array, "2"]  # raw threefry key data
    captured: Float[Array, ""]  # |PᵀG|²/|G|² of the last step, over all projected blocks
    projectors: Any  # a leaf (*, m, r), float32 with orthonormal columns, or int8 codes
    low: Any  # state of `inner` over (*, r, n) leaves
    full: Any  # state of `inner` over the unprojected leaves (*, m, n)
    outside: Any  # state of the lift: of `residual`, if it is a rule; GUM's slots
    projectors_scales: Any = ()  # with `projector_dtype` int8 a tree: each leaf (*, ceil(m / 128), r) float32


def low_rank(
    inner: optax.GradientTransformation,
    rank: int,
    period: int,
    *,
    find_subspace: SubspaceFinder = track_subspace,
    on_refresh: OnRefresh = keep,
    residual: Residual = drop,
    key: int | jax.Array = 0,
    projector_dtype: Any = None,
    carry: OnRefresh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on the coordinates of the gradient in a slowly changing subspace.

        R = Pᵀ G,   S = inner(R),   step = P S  (+ residual),   a new P every `period` steps

    A block with `min(m, n) <= rank` is not projected: `inner` runs on the full matrix, and a
    refresh leaves its state as it is.

    Args:
      inner: the rule in the subspace, e.g. `optax.chain(optax.trace(0.95), orthogonalize())`. It sees no
        parameters, because they live in the full space.
      rank: `r`, columns of the projector.
      period: `K`, steps between refreshes; the first step refreshes.
      find_subspace: `track_subspace`, `svd_subspace`, `random_subspace`, or any function
        `(key, gradient, previous) -> projector` with orthonormal columns; `switch_subspace` changes
        between two.
      on_refresh: what becomes of inner's state at a refresh: `keep`, `rotate`, `rotate_first_moment`,
        `restart`, or any function `(inner, state, coordinates, rotation, is_refresh) -> state`, with trees of
        zeros `(*, r, n)` and of the rotations `P_newᵀ P_old` `(*, r, r)`.
      residual: what becomes of the gradient outside the subspace: `drop`, `add_raw`, any function
        `(g, p, r, s) -> step` of one leaf, or a rule, whose step from `G - P R` is added to `P S`:
        `normalize(jnp.sign)` is FRUGAL's. A rule gets `coordinates` (R) and `steps` (S) as extra arguments.
      key: an integer seed or a JAX key, for finders that draw.
      projector_dtype: the dtype of the stored `P`: float32 (the default), or int8, where 128 numbers of a
        column share a scale. The columns that a step reads are orthonormal in both.
      carry: the old name of `on_refresh`, deprecated.

    Returns:
      A transformation over trees of `(*, m, n)` leaves, the side of size `m` projected, with state
      `LowRankState`: `r (m + n)` numbers a block where inner keeps one momentum.

    Raises:
      TypeError, ValueError: an argument or a leaf is out of range or of the wrong type.

    Examples:
      >>> rule = gum_optax.low_rank(optax.identity(), 2, 200, find_subspace=gum_optax.svd_subspace)
      >>> gradients = {"kernel": jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))}
      >>> steps, state = rule.update(gradients, rule.init(gradients))
      >>> print(np.linalg.norm(steps["kernel"], axis=1).round(2))  # the two largest rows
      [4. 3. 0. 0.]
      >>> round(float(state.captured), 3)  # 25 of 30
      0.833

    References:
      Zhao et al., GaLore, arXiv 2403.03507, Algorithm 2.
    """
    inner = optax.with_extra_args_support(check_rule("inner", inner))
    rank = check_integer("rank", rank, at_least=1)
    period = check_integer("period", period, at_least=1)
    check_function("find_subspace", find_subspace, "gum_optax.svd_subspace")
    on_refresh = renamed_argument("low_rank", "carry", carry, "on_refresh", on_refresh)
    check_function("on_refresh", on_refresh, "gum_optax.keep")
    check_key(key)
    storage = projector_storage(projector_dtype)
    subspace = Subspace(rank, period, find_subspace, on_refresh, key, storage)
    lift = lift_with(residual)

    def plan_for(tree):
        # A stack of no matrices has no subspace.
        is_projected = [leaf.size > 0 and min(leaf.shape[-2:]) > rank for leaf in jax.tree.leaves(tree)]
        return Plan(is_projected, None, lift)

    return in_subspace(inner, subspace, plan_for)


def in_subspace(
    inner: optax.GradientTransformationExtraArgs, subspace: Subspace, plan_for: Callable[[Any], Plan]
) -> optax.GradientTransformationExtraArgs:
    """Runs a rule in a subspace by a plan: GaLore's and GUM's plans differ, their update is this one.

    Args:
      inner: the rule in the subspace.
      subspace: where the subspace comes from.
      plan_for: a function from a tree to its plan.
    """

    def init(params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            check_matrix_leaf(path, leaf)
        return _initial(inner, subspace, plan_for(params), params)

    def update(updates, state, params=None, *, context: MatrixContext = NO_CONTEXT, **extra_args):
        del params
        if context.turn.is_probe:
            return updates, state
        plan = plan_for(context.turn.whole(updates))
        return _updated(inner, subspace, plan, updates, state, context, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _initial(
    inner: optax.GradientTransformationExtraArgs, subspace: Subspace, plan: Plan, params: optax.Params
) -> LowRankState:
    """The state before the first step. Its random subspace only gives the first refresh a start."""
    projected, unprojected = split(params, plan.is_projected)
    data = key_data(subspace.key)
    if (heard := listener()) is not None:
        heard.ranks.append(subspace.rank)

    def start(leaf_index, g):
        return first_subspace(stream(data, jnp.int32(0), leaf_index), g, subspace.rank)

    coordinates = jax.tree.map(lambda g: zeros(g, subspace.rank, -1), projected)
    with coordinates_of(projected):
        inner_state = inner.init(coordinates)
        # A function that does not fit inner fails here, and not at the first refresh.
        rotation = jax.tree.map(lambda r: zeros(r, subspace.rank, subspace.rank), coordinates)
        refreshed = functools.partial(subspace.on_refresh, inner)
        jax.eval_shape(refreshed, inner_state, coordinates, rotation, True)
    starts = map_with_leaf_index(start, projected)
    # Accumulators are float32, whatever the model is.
    projected, unprojected = (
        optax.tree.zeros_like(tree, dtype=jnp.float32) for tree in (projected, unprojected)
    )
    projectors, scales = trees_of_stored(starts, list(map(subspace.storage.first, jax.tree.leaves(starts))))
    return LowRankState(
        count=jnp.zeros((), jnp.int32),
        refreshes=jnp.zeros((), jnp.int32),
        period=jnp.asarray(subspace.period, jnp.int32),
        key=data,
        captured=jnp.zeros((), jnp.float32),
        projectors=projectors,
        low=inner_state,
        full=inner.init(unprojected),
        outside=plan.lift.init(projected),
        projectors_scales=scales,
    )


def _updated(
    inner: optax.GradientTransformationExtraArgs,
    subspace: Subspace,
    plan: Plan,
    updates: optax.Updates,
    state: LowRankState,
    context: MatrixContext,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, LowRankState]:
    """The steps of all leaves, and the state after them."""
    accept, turn = context.accept, context.turn
    is_projected = turn.of_whole(updates, lambda _: plan.is_projected)
    projected, unprojected = split(updates, is_projected)
    views, _ = split(views_beside(updates, context.views), is_projected)
    gradient = gradient_of(projected, jax.tree.leaves(views), context)
    is_refresh = begins_period(state.count, subspace.period, accept)
    projections = projections_of(gradient, subspace, state, is_refresh, projected, context)
    projectors, coordinates = projections.projectors, projections.coordinates  # P, R = PᵀG
    stored, scales = _stored(subspace.storage, projectors, state, is_refresh, accept)
    with coordinates_of(projected):
        low_state = _on_refresh(inner, subspace, state.low, projections, is_refresh, accept)
    weights = None if plan.weights is None else turn.of_whole(projected, lambda _: plan.weights)
    weighted = _times(weights, coordinates)
    step = LowRankStep(
        projected, projectors, coordinates, gradient, views, is_refresh, state.count, state.key
    )
    extra_args = extra_args | {"context": MatrixContext(accept=accept, turn=turn)}
    beside, lift_state = plan.lift.begin(step, state.outside, **extra_args)
    after_those = extra_args | {"context": MatrixContext(accept=accept, turn=turn, waits_for=beside)}
    steps, low_state = inner.update(weighted, low_state, None, **after_those)  # S
    steps, energies = measured_before(steps, projections.energies)
    lifted, lift_state = plan.lift.update(step, steps, beside, lift_state, **extra_args)  # P S + residual
    unprojected = optax.tree.cast(unprojected, jnp.float32)
    full_steps, full_state = inner.update(unprojected, state.full, None, **extra_args)
    new_state = LowRankState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        refreshes=state.refreshes + is_refresh,
        period=state.period,
        key=state.key,
        captured=captured_share(energies, turn, turn.are_live(projected)),
        projectors=stored,
        low=low_state,
        full=full_state,
        outside=lift_state,
        projectors_scales=scales,
    )
    return merge(lifted, full_steps), new_state


def _stored(
    storage: ProjectorStorage,
    projectors: Any,
    state: LowRankState,
    is_refresh: Bool[Array, ""],
    accept: Acceptance | None,
) -> tuple[Any, Any]:
    """What is stored of the projectors after a step; a leaf that rejects the step keeps what it has."""
    rows = zip(
        accepted_by(accept, projectors), jax.tree.leaves(projectors), stored_projectors(state), strict=True
    )
    stored = trees_of_stored(projectors, [storage.store(is_refresh, *row) for row in rows])
    return stored if accept is None else accept.mark_kept(stored)


def _on_refresh(
    inner: optax.GradientTransformationExtraArgs,
    subspace: Subspace,
    state: optax.OptState,
    projections: Projections,
    is_refresh: Bool[Array, ""],
    accept: Acceptance | None,
) -> optax.OptState:
    """The state of `inner` for the subspace of this step."""
    like = optax.tree.zeros_like(projections.coordinates)
    new = subspace.on_refresh(inner, state, like, projections.rotations, is_refresh)
    if accept is None or subspace.on_refresh in FOLLOWING:
        return new
    return accept.keep_refreshed_if_rejected(inner, new, state, like)


def _times(weights: Sequence[float] | None, tree: optax.Updates) -> optax.Updates:
    """The leaves, each times its weight."""
    if weights is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([w * x for w, x in zip(weights, leaves, strict=True)])
