"""A rule run on the coordinates of the gradient in a slowly changing subspace."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from ._checks import check_function, check_integer, check_matrix_leaf, check_rule
from ._norms import inverse
from ._residuals import Residual, Told, drop, stepping
from ._sampling import check_key, key_data, stream
from ._subspace import (
    SubspaceFinder,
    exact_matmul,
    finder_at,
    project,
    random_subspace,
    subspace_iteration,
)
from ._trees import map_with_place, merge, split


class LowRankState(NamedTuple):
    """State of `low_rank`; trees have holes (`optax.MaskedNode`) where a leaf is not projected."""

    count: Int[Array, ""]  # steps taken  # pyright: ignore[reportIncompatibleMethodOverride]
    refreshes: Int[Array, ""]  # subspaces found
    key: UInt32[Array, "2"]  # raw threefry key data
    captured: Float[Array, ""]  # |PᵀG|²/|G|² of the last step, over all projected blocks
    projectors: Any  # a leaf (*, m, r) float32, orthonormal columns
    low: Any  # state of `inner` over (*, r, n) leaves
    full: Any  # state of `inner` over the unprojected leaves (*, m, n)
    outside: Any  # state of what becomes of the rest: of `residual`, where it is a rule; GUM's slots


# Carries: (inner, its state, coordinates, rotation P_newᵀ P_old) -> its state for the new subspace.
Carry = Callable[[Any, Any, Any, Any], Any]


def keep(inner: Any, state: Any, coordinates: Any, rotation: Any) -> Any:
    """The state stays as it is: coordinates in the old subspace are read as ones in the new (GaLore)."""
    del inner, coordinates, rotation
    return state


def _rotated(rotation: Float[Array, "*b r r"], m: Float[Array, "*b r n"]) -> Float[Array, "*b r n"]:
    return exact_matmul(rotation, m).astype(m.dtype)


def rotate(inner: Any, state: Any, coordinates: Any, rotation: Any) -> Any:
    """Every accumulator follows the subspace: `M ← (P_newᵀ P_old) M` (SUMO).

    Right for what is linear in the gradient, such as `optax.trace`; a second moment is not. Leaves of
    inner's state that do not have the coordinates' shape, such as norms, stay as they are.
    """

    def follow(m, q, r):
        return _rotated(q, m) if m.shape == r.shape else m

    return optax.tree.map_params(inner, follow, state, rotation, coordinates)


def rotate_first_moment(inner: Any, state: Any, coordinates: Any, rotation: Any) -> Any:
    """Adam's mean follows the subspace, `M ← (P_newᵀ P_old) M`; its squares stay as they are (GoLore).

    For an inner rule whose state has one field `mu`, as those of `optax.scale_by_adam` and its kin.

    Raises:
      ValueError: there is no such field.
      KeyError: there are several.
    """
    del inner, coordinates

    def is_field(path, _):  # of a NamedTuple, and not a module of that name
        return isinstance(path[-1], optax.tree_utils.NamedTupleKey)

    mean = optax.tree.get(state, "mu", filtering=is_field)
    if mean is None:
        raise ValueError(
            f"rotate_first_moment needs a state with a field mu, got {type(state).__name__}; use rotate."
        )
    rotated = jax.tree.map(_rotated, rotation, mean)
    return optax.tree.set(state, is_field, mu=rotated)


def restart(inner: Any, state: Any, coordinates: Any, rotation: Any) -> Any:
    """The state starts again from `inner.init` (GUM)."""
    del state, rotation
    return inner.init(coordinates)


def _captured(coordinates: Any, gradients: Any) -> Float[Array, ""]:
    """`Σ|PᵀG|² / Σ|G|²`, zero for zero gradients.

    Each leaf is scaled by its own largest coordinate against overflow: a scale that leaves shared would be
    written out at their size.
    """
    pairs = list(zip(jax.tree.leaves(coordinates), jax.tree.leaves(gradients), strict=True))
    if not pairs:
        return jnp.zeros((), jnp.float32)
    scales = jnp.stack([jnp.max(jnp.abs(r)) for r, _ in pairs])
    share = jnp.square(scales * inverse(scales.max()))

    def square(x, scale):
        return jnp.sum(jnp.square(x * inverse(scale)), dtype=jnp.float32)

    inside = jnp.stack([square(r, s) for (r, _), s in zip(pairs, scales, strict=True)])
    whole = jnp.stack([square(g, s) for (_, g), s in zip(pairs, scales, strict=True)])
    return share @ inside * inverse(share @ whole)


def low_rank(
    inner: optax.GradientTransformation,
    rank: int,
    period: int,
    *,
    find_subspace: SubspaceFinder = subspace_iteration,
    carry: Carry = keep,
    residual: Residual = drop,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on the coordinates of the gradient in a slowly changing subspace.

        R = Pᵀ G,   S = inner(R),   step = P S  (+ residual),   P found anew every `period` steps

    A block with `m <= rank` is not projected: `inner` runs on the full matrix and is never carried.

    Args:
      inner: the rule in the subspace, e.g. `optax.chain(optax.trace(0.95), orthogonalize())`. It is
        given no parameters: they live in the full space.
      rank: `r`, columns of the projector.
      period: `K`, steps between refreshes; the first step refreshes.
      find_subspace: `svd_subspace`, `subspace_iteration`, `random_subspace`, or any function
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
    return in_subspace(inner, subspace, stepping(residual), lambda shape: shape[0] > rank)


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
    rank, period, find_subspace, carry, key = subspace

    def split_by_shape(tree):
        return split(tree, [is_projected(leaf.shape[-2:]) for leaf in jax.tree.leaves(tree)])

    def init(params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            check_matrix_leaf(path, leaf)
        low, full = split_by_shape(params)
        data = key_data(key)

        def start(place, g):
            shape = (*g.shape[:-1], rank)
            return random_subspace(stream(data, jnp.int32(0), place), g, jnp.zeros(shape, jnp.float32))

        coordinates = jax.tree.map(lambda g: zero_coordinates(g, rank), low)
        inner_state = inner.init(coordinates)
        # A carry that does not fit inner says so here, and not at the first refresh.
        rotation = jax.tree.map(lambda r: jnp.zeros((*r.shape[:-2], rank, rank)), coordinates)
        jax.eval_shape(functools.partial(carry, inner), inner_state, coordinates, rotation)
        return LowRankState(
            count=jnp.zeros((), jnp.int32),
            refreshes=jnp.zeros((), jnp.int32),
            key=data,
            captured=jnp.zeros((), jnp.float32),
            projectors=map_with_place(start, low),
            low=inner_state,
            full=inner.init(float32_zeros(full)),
            outside=step_from.init(float32_zeros(low)),
        )

    def update(updates, state, params=None, **extra_args):
        del params
        low, full = split_by_shape(updates)
        due = state.count % period == 0

        find = finder_at(find_subspace, state.count)

        def refreshed(place, g, p):
            place_key = stream(state.key, state.count // period, place)
            # One branch a leaf: a single one would hold every gradient at once.
            return jax.lax.cond(due, find, lambda key, g, p: p, place_key, g, p)

        projectors = map_with_place(refreshed, low, state.projectors)
        coordinates = jax.tree.map(project, projectors, low)

        def carried():
            rotation = jax.tree.map(lambda new, old: exact_matmul(new.mT, old), projectors, state.projectors)
            return carry(inner, state.low, coordinates, rotation)

        inner_state = jax.lax.cond(due, carried, lambda: state.low)
        steps, inner_state = inner.update(coordinates, inner_state, None, **extra_args)
        told = Told(projectors, coordinates, steps, state.count, state.key)
        steps, outside_state = step_from.update(low, state.outside, None, **extra_args | {"told": told})
        full_steps, full_state = inner.update(as_float32(full), state.full, None, **extra_args)
        new_state = LowRankState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            refreshes=state.refreshes + due,
            key=state.key,
            captured=_captured(coordinates, low),
            projectors=projectors,
            low=inner_state,
            full=full_state,
            outside=outside_state,
        )
        return merge(steps, full_steps), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def float32_zeros(tree: Any) -> Any:
    """What `inner.init` sees of unprojected leaves: its accumulators are float32 whatever the model is."""
    return jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), tree)


def as_float32(tree: Any) -> Any:
    """What `inner.update` sees of unprojected leaves."""
    return jax.tree.map(lambda g: g.astype(jnp.float32), tree)


def zero_coordinates(g: Float[Array, "*b m n"], rank: int) -> Float[Array, "*b r n"]:
    """What `inner.init` sees of a projected leaf."""
    return jnp.zeros((*g.shape[:-2], rank, g.shape[-1]), jnp.float32)
