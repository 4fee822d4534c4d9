"""The unbiased paradigm: a few sampled blocks run at full rank and make up for what projection loses."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from .._core.acceptance import Acceptance
from .._core.batches import map_sequentially
from .._core.checks import check_fraction, check_function, check_integer, check_rule
from .._core.context import MatrixContext
from .._core.keys import check_key, key_data
from .._core.trees import split
from .._core.turns import Turn
from .._core.xla import in_one
from .._linalg.orthonormal import lift, outside, project
from .._matrices.view import View, plain_view
from .finders import SubspaceFinder
from .low_rank import in_subspace
from .on_refresh import restart
from .plan import Lift, LowRankStep, Plan
from .projections import Subspace
from .projectors import projector_storage
from .slots import Group, Index, Slots, groups_of
from .slots_in_turns import SlotsInTurn
from .switch import track_subspace


class Weights(NamedTuple):
    """The input of each branch; its mean over the draw is `G` when
    `(1-q) low + q inside = 1` and `q outside = 1`.

    Examples:
      >>> q, weights = 0.5, gum_optax.Weights(low=1.5, inside=0.5, outside=2.0)
      >>> tx = gum_optax.gum(1e-3, full_rank_fraction=q, compensation=lambda q: weights)
      >>> (1 - q) * weights.low + q * weights.inside, q * weights.outside  # unbiased
      (1.0, 1.0)
    """

    low: float  # low-rank branch: low · PᵀG
    inside: float  # full-rank branch: inside · P PᵀG ...
    outside: float  # ... + outside · (G - P PᵀG)


Compensation = Callable[[float], Weights]


def complement(q: float) -> Weights:
    """The paper's: `PᵀG/(1-q)` in the subspace, `(G - P PᵀG)/q` at full rank.

    Variance of the estimate: `q/(1-q) |P PᵀG|² + (1-q)/q |G - P PᵀG|²`.
    (Pan et al., GUM, arXiv 2510.17802, Algorithms 1 and 2.)

    Examples:
      >>> gum_optax.complement(0.25)
      Weights(low=1.3333333333333333, inside=0.0, outside=4.0)
    """
    return Weights(low=1 / (1 - q), inside=0.0, outside=1 / q)


def low_variance(q: float) -> Weights:
    """`PᵀG` in the subspace, `(G - (1-q) P PᵀG)/q = P PᵀG + (G - P PᵀG)/q` at full rank.

    Variance of the estimate: `(1-q)/q |G - P PᵀG|²`, never more than `complement`'s. Under an
    orthogonalizer that says little: its sampled blocks spend their step on the subspace too.

    Examples:
      >>> gum_optax.low_variance(0.25)
      Weights(low=1.0, inside=1.0, outside=4.0)
    """
    return Weights(low=1.0, inside=1.0, outside=1 / q)


class SampledState(NamedTuple):
    """What `unbiased_low_rank` keeps of its sampled blocks. A group is named by its shape, as in `"64x256"`.

    Where no group is sampled, `index` and `slots` are the scalar 0.

    Examples:
      >>> rule = gum_optax.unbiased_low_rank(optax.trace(0.9), 2, 200, full_rank_fraction=0.25)
      >>> sampled = rule.init({"kernel": jnp.ones((8, 4, 8))}).outside
      >>> sampled.index["4x8"].shape, sampled.slots.trace["4x8"].shape
      ((2,), (2, 4, 8))
    """

    index: Any  # {group: (γ,) int32}, the sampled blocks of each group, counted over its leaves
    slots: Any  # state of `inner` over {group: (γ, m, n)}, the sampled blocks' full-rank momentum


def unbiased_low_rank(
    inner: optax.GradientTransformation,
    rank: int,
    period: int,
    full_rank_fraction: float,
    *,
    find_subspace: SubspaceFinder = track_subspace,
    compensation: Compensation = complement,
    key: int | jax.Array = 0,
    projector_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on an unbiased low-rank estimate of the gradient.

    Every `period` steps the subspace `P` is found anew, `γ` of the `L` blocks of each group (same
    shape) are drawn without replacement, and inner's states restart. With `q = γ/L`, on each step

        low-rank block     S = inner(PᵀG / (1-q))          step = P S
        sampled block      S = inner((G - P PᵀG) / q)      step = S

    (the weights are `complement`'s). For a `P` that does not depend on the draw, the mean over draws
    of inner's input, lifted back, is `G`. The mean of inner's step depends on inner:

    - `optax.identity()` (SGD), `optax.trace` (momentum): linear, so the step itself is unbiased.
    - `optax.scale_by_adam()`: its mean is; the squares have the estimate's variance in them, and so the
      step is biased, and smaller where `q` is small.
    - `optax.scale_by_lion()`, and momentum with `orthogonalize()` (Muon, hence GUM): the momentum is; the
      sign and the polar factor are not linear, so the step is not. `P` commutes with the polar factor
      (`msign(P R) = P msign(R)`) but not with the sign.

    `γ = clip(round(full_rank_fraction · L), 1, L)`, or 0 when the fraction is 0 (then this is
    `low_rank` with `on_refresh=restart`). Blocks with `min(m, n) <= rank`, and groups with `γ = L`, are not
    projected: inner runs on the full matrix, without restarts.

    Args:
      inner: the rule, run both on coordinates `(*, r, n)` and on full matrices `(γ, m, n)`.
      rank: `r`, columns of the projector.
      period: `K`, steps between refreshes; the first step refreshes.
      full_rank_fraction: the asked share of blocks at full rank, in `[0, 1]`.
      find_subspace: as in `low_rank`.
      compensation: `complement` (the paper's) or `low_variance`; any `q -> Weights`.
      key: an integer seed or a JAX key: all draws follow from it.
      projector_dtype: as in `low_rank`.

    Returns:
      A transformation over trees of `(*, m, n)` leaves with state `LowRankState`, `SampledState` within:
      `r (m + n) + q m n` numbers a block where inner keeps one momentum.

    Raises:
      TypeError, ValueError: an argument or a leaf is out of range or of the wrong type.

    Examples:
      >>> rule = gum_optax.unbiased_low_rank(optax.identity(), 1, 200, 0.5)
      >>> gradients = {"kernel": jax.random.normal(jax.random.key(0), (2, 4, 8))}
      >>> steps, state = rule.update(gradients, rule.init(gradients))
      >>> sorted(np.linalg.matrix_rank(steps["kernel"], tol=1e-3).tolist())  # low-rank, sampled
      [1, 3]

    References:
      Pan et al., Unbiased Gradient Low-Rank Projection, arXiv 2510.17802, Algorithm 1.
    """
    inner = optax.with_extra_args_support(check_rule("inner", inner))
    rank = check_integer("rank", rank, at_least=1)
    period = check_integer("period", period, at_least=1)
    fraction = check_fraction("full_rank_fraction", full_rank_fraction)
    check_function("find_subspace", find_subspace, "gum_optax.svd_subspace")
    check_function("compensation", compensation, "gum_optax.complement")
    check_key(key)

    subspace = Subspace(rank, period, find_subspace, restart, key, projector_storage(projector_dtype))

    def plan_for(tree):
        """The number of blocks of each shape decides how many are sampled, and so the weights."""
        groups = groups_of(tree, rank, fraction)
        shapes = {group.shape for group in groups.values() if not group.is_full}
        leaves = jax.tree.leaves(tree)
        is_projected = [leaf.shape[-2:] in shapes for leaf in leaves]
        projected, _ = split(leaves, is_projected)
        # Group again: the lift sees only the projected leaves, so the groups' indices count those.
        slots = Slots({n: g for n, g in groups_of(projected, rank, fraction).items() if g.slots}, period)
        weight = {group.shape: compensation(group.fraction).low for group in slots.groups.values()}
        weights = [weight.get(leaf.shape[-2:], 1.0) for leaf in jax.tree.leaves(projected)]
        return Plan(is_projected, weights, _lift_with_slots(inner, slots, compensation, key))

    return in_subspace(inner, subspace, plan_for)


def _lift_with_slots(
    inner: optax.GradientTransformationExtraArgs, slots: Slots, compensation: Compensation, key: Any
) -> Lift:
    """`P S`, and for the sampled blocks the step of `inner` at full rank in its place."""

    def init(params):
        if not slots.groups:
            # One ordinary leaf and not an empty dict: `optax.tree.map_params` calls `init` with a leafless
            # tree and compares structures.
            return SampledState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        index = slots.draw(key_data(key), jnp.zeros((), jnp.int32))
        return SampledState(index, inner.init(slots.zeros(params)))

    def begin(step: LowRankStep, state, /, *, context: MatrixContext, **extra_args):
        """The steps of the slots. In the turn of one layer each slot takes its step in `update`."""
        if not slots.groups or isinstance(context.turn, Turn):
            return {}, state
        index = in_one(slots.draw, step.key, step.count)
        input_of = _input_of(compensation, step.updates)
        inputs = slots.gather(index, step.gradient, step.projectors, input_of)
        empty = slots.zeros(step.updates)
        slot_state = restart(inner, state.slots, empty, None, step.is_refresh)
        outer = context.accept
        accept = None if outer is None else _acceptance_of_slots(outer, step.updates, slots, index)
        if accept is not None:
            slot_state = accept.keep_refreshed_if_rejected(inner, slot_state, state.slots, empty)
        of_slots = MatrixContext(_slot_views(slots, inputs, step.views), accept)
        slot_steps, slot_state = inner.update(inputs, slot_state, None, context=of_slots, **extra_args)
        if outer is not None and accept is not None:
            outer.mark_kept_by(accept, slot_state)
        return slot_steps, SampledState(index, slot_state)

    def update(step: LowRankStep, steps, slot_steps, state, /, *, context: MatrixContext, **extra_args):
        if not slots.groups:
            return map_sequentially(lift, step.projectors, steps), state
        if not isinstance(context.turn, Turn):
            return slots.scatter(state.index, slot_steps, step.projectors, steps), state
        index = context.turn.once(lambda: in_one(slots.draw, step.key, step.count))
        input_of = _input_of(compensation, context.turn.whole(step.updates))
        own = SlotsInTurn(inner, slots, index, context.turn, input_of, step.is_refresh, extra_args)
        steps, slot_state = own.update(step, steps, state.slots, context.accept)
        return steps, SampledState(index, slot_state)

    return Lift(init, update, begin)


def _input_of(compensation: Compensation, updates: optax.Updates) -> Callable[[Group], Callable[..., Array]]:
    """From a group to the function that makes the input of a sampled block."""
    leaves = jax.tree.leaves(updates)

    def input_of(group):
        eps = max(float(jnp.finfo(leaves[i].dtype).eps) for i in group.leaf_indices)
        return functools.partial(_full_rank_input, weights=compensation(group.fraction), eps=eps)

    return input_of


def _acceptance_of_slots(accept: Acceptance, updates: Any, slots: Slots, index: Index) -> Acceptance:
    """Of the slots: a slot accepts a step if the leaf of its block does."""
    if accept.by_leaf is None:
        return Acceptance(accept.all_leaves)
    accepted = accept.of_leaves(updates)

    def of_slots(name):
        group = slots.groups[name]
        flags = [jnp.full(size, accepted[i]) for i, size in zip(group.leaf_indices, group.sizes, strict=True)]
        return jnp.concatenate(flags)[index[name]]

    # In the order of a dict's leaves.
    return Acceptance(accept.all_leaves, {i: of_slots(name) for i, name in enumerate(sorted(slots.groups))})


def _slot_views(slots: Slots, inputs: dict[str, Array], views: Any) -> dict[str, View]:
    """Of slots, which are sharded as the blocks of the first leaf of their group are."""
    leaves = jax.tree.leaves(views)

    def view_of(name, group):
        plain, sharding = plain_view(inputs[name]), leaves[group.leaf_indices[0]].sharding
        if sharding is None:
            return plain
        spec = PartitionSpec(None, *sharding.spec[-2:])
        return dataclasses.replace(plain, sharding=NamedSharding(sharding.mesh, spec))

    return {name: view_of(name, group) for name, group in slots.groups.items()}


def _full_rank_input(
    g: Float[Array, "m n"], p: Float[Array, "m r"], weights: Weights, eps: float
) -> Float[Array, "m n"]:
    """`inside · P PᵀG + outside · (G - P PᵀG)`."""
    beyond = weights.outside * outside(p, g, eps)
    return beyond + weights.inside * lift(p, project(p, g)) if weights.inside else beyond
