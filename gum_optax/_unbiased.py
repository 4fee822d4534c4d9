"""The unbiased paradigm: a few sampled blocks run at full rank and carry what projection loses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ._checks import check_fraction, check_function, check_integer, check_matrix_leaf, check_rule
from ._low_rank import LowRankState, as_float32, float32_zeros, low_rank, restart
from ._sampling import check_key, draw
from ._slots import Group, groups_of, put, take
from ._subspace import SubspaceFinder, lift, outside, project, subspace_iteration
from ._trees import is_hole, merge, split


class Weights(NamedTuple):
    """What each branch is fed; the mean over the draw is `G` when
    `(1-q) low + q inside = 1` and `q outside = 1`.
    """

    low: float  # low-rank branch: low · PᵀG
    inside: float  # full-rank branch: inside · P PᵀG ...
    outside: float  # ... + outside · (G - P PᵀG)


Compensation = Callable[[float], Weights]


def complement(q: float) -> Weights:
    """The paper's: `PᵀG/(1-q)` in the subspace, `(G - P PᵀG)/q` at full rank.

    Variance of the estimate: `q/(1-q) |P PᵀG|² + (1-q)/q |G - P PᵀG|²`.
    (Pan et al., GUM, arXiv 2510.17802, Algorithms 1 and 2.)
    """
    return Weights(low=1 / (1 - q), inside=0.0, outside=1 / q)


def low_variance(q: float) -> Weights:
    """`PᵀG` in the subspace, `(G - (1-q) P PᵀG)/q = P PᵀG + (G - P PᵀG)/q` at full rank.

    Variance of the estimate: `(1-q)/q |G - P PᵀG|²`, never more than `complement`'s. Under an
    orthogonalizer that says little: its sampled blocks spend their step on the subspace too.
    """
    return Weights(low=1.0, inside=1.0, outside=1 / q)


class UnbiasedLowRankState(NamedTuple):
    """State of `unbiased_low_rank`. A group is named by its shape, as in `"64x256"`.

    Where no group is sampled, `index` and `slots` are the scalar 0.
    """

    low: LowRankState  # of the projected blocks, with the step count and the key
    full: Any  # state of `inner` over the leaves that are never projected (*, m, n)
    index: Any  # {group: (k,) int32}, the sampled blocks of each group, counted over its leaves
    slots: Any  # state of `inner` over {group: (k, m, n)}, the sampled blocks' full-rank momentum


def unbiased_low_rank(
    inner: optax.GradientTransformation,
    rank: int,
    period: int,
    full_rank_fraction: float,
    *,
    find_subspace: SubspaceFinder = subspace_iteration,
    compensation: Compensation = complement,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on an unbiased low-rank estimate of the gradient.

    Every `period` steps the subspace `P` is found anew, `k` of the `L` blocks of each group (same
    shape) are drawn without replacement, and inner's states restart. With `q = k/L`, on each step

        low-rank block     S = inner(PᵀG / (1-q))          step = P S
        sampled block      S = inner((G - P PᵀG) / q)      step = S

    (the weights are `complement`'s). For a `P` that does not depend on the draw, the mean over draws
    of what inner is fed, lifted back, is `G`. What inner makes of it is another matter:

    - `optax.identity()` (SGD), `optax.trace` (momentum): linear, so the step itself is unbiased.
    - `optax.scale_by_adam()`: its mean is; the squares have the estimate's variance in them, and so the
      step is biased, and smaller where `q` is small.
    - `optax.scale_by_lion()`, and momentum with `orthogonalize()` (Muon, hence GUM): the momentum is; the
      sign and the polar factor are not linear, so the step is not. `P` commutes with the polar factor
      (`msign(P R) = P msign(R)`) but not with the sign.

    `k = clip(round(full_rank_fraction · L), 1, L)`, or 0 when the fraction is 0 (then this is
    `low_rank` with `carry=restart`). Blocks with `m <= rank`, and groups with `k = L`, are not
    projected: inner runs on the full matrix, without restarts.

    Args:
      inner: the rule, run both on coordinates `(*, r, n)` and on full matrices `(k, m, n)`.
      rank: `r`, columns of the projector.
      period: `K`, steps between refreshes; the first step refreshes.
      full_rank_fraction: the asked share of blocks at full rank, in `[0, 1]`.
      find_subspace: as in `low_rank`.
      compensation: `complement` (the paper's) or `low_variance`; any `q -> Weights`.
      key: an integer seed or a JAX key: all draws follow from it.

    Returns:
      A transformation over trees of `(*, m, n)` leaves with state `UnbiasedLowRankState`:
      `r (m + n) + q m n` numbers a block where inner keeps one momentum.

    Raises:
      TypeError, ValueError: an argument or a leaf is out of range or of the wrong type.

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

    def plan(tree) -> tuple[dict[str, Group], list[bool], Any]:
        """The sampled groups, which leaves are projected, and the rule of those."""
        groups = groups_of(tree, rank, fraction).values()
        sampled = {group.name: group for group in groups if group.slots and not group.is_full}
        chosen = {place: not group.is_full for group in groups for place in group.places}
        weight = {place: compensation(g.fraction).low for g in sampled.values() for place in g.places}
        leaves, treedef = jax.tree.flatten(tree)
        weights = treedef.unflatten([weight.get(place, 1.0) for place in range(len(leaves))])
        fed = optax.chain(_weighted(weights), inner)
        rule = low_rank(fed, rank, period, find_subspace=find_subspace, carry=restart, key=key)
        return sampled, [chosen[place] for place in range(len(leaves))], rule

    def fresh_slots(sampled):
        return inner.init({name: jnp.zeros((g.slots, *g.shape), jnp.float32) for name, g in sampled.items()})

    def draws(sampled, state):
        period_index = state.count // period
        return {name: draw(state.key, period_index, name, g.blocks, g.slots) for name, g in sampled.items()}

    def init(params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            check_matrix_leaf(path, leaf)
        sampled, chosen, rule = plan(params)
        low, full = split(params, chosen)
        low_state = rule.init(low)
        # Where nothing is sampled, one ordinary leaf and not an empty dict: `optax.tree.map_params` calls
        # `init` with a leafless tree and compares structures.
        index = draws(sampled, low_state) if sampled else jnp.zeros((), jnp.int32)
        slots = fresh_slots(sampled) if sampled else jnp.zeros((), jnp.int32)
        return UnbiasedLowRankState(low_state, inner.init(float32_zeros(full)), index, slots)

    def update(updates, state, params=None, **extra_args):
        del params
        sampled, chosen, rule = plan(updates)
        low, full = split(updates, chosen)
        steps, low_state = rule.update(low, state.low, None, **extra_args)
        full_steps, full_state = inner.update(as_float32(full), state.full, None, **extra_args)
        steps = merge(steps, full_steps)
        if not sampled:
            return steps, UnbiasedLowRankState(low_state, full_state, state.index, state.slots)

        index = draws(sampled, state.low)
        gradients = jax.tree.leaves(updates)
        projectors = jax.tree.leaves(merge(low_state.projectors, full))
        fed = {}
        for name, group in sampled.items():
            pairs = [(gradients[place], projectors[place]) for place in group.places]
            g, p = take(pairs, index[name], group)
            eps = max(float(jnp.finfo(gradients[place].dtype).eps) for place in group.places)
            fed[name] = _full_rank_input(g, p, compensation(group.fraction), eps)
        due = state.low.count % period == 0
        slots = jax.lax.cond(due, lambda: fresh_slots(sampled), lambda: state.slots)
        slot_steps: Any
        slot_steps, slots = inner.update(fed, slots, None, **extra_args)

        leaves, treedef = jax.tree.flatten(steps)
        for name, group in sampled.items():
            written = put([leaves[place] for place in group.places], slot_steps[name], index[name], group)
            for place, leaf in zip(group.places, written, strict=True):
                leaves[place] = leaf
        return treedef.unflatten(leaves), UnbiasedLowRankState(low_state, full_state, index, slots)

    return optax.GradientTransformationExtraArgs(init, update)


def _weighted(weights: Any) -> optax.GradientTransformation:
    """Multiply each leaf, where there is one, by its weight."""

    def multiply(updates, params):
        del params
        return jax.tree.map(lambda w, x: x if is_hole(x) else w * x, weights, updates)

    return optax.stateless(multiply)


def _full_rank_input(
    g: Float[Array, "k m n"], p: Float[Array, "k m r"], weights: Weights, eps: float
) -> Float[Array, "k m n"]:
    """`inside · P PᵀG + outside · (G - P PᵀG)`."""
    fed = weights.outside * outside(p, g, eps)
    return fed + weights.inside * lift(p, project(p, g)) if weights.inside else fed
