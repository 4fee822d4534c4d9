"""The projections of a step: every leaf's projector, its rotation, and the coordinates `PᵀG`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from .._core.acceptance import Acceptance, Accepted
from .._core.context import MatrixContext
from .._core.trees import leaf_indices_of
from .._core.xla import barrier_but_on_cpu
from .._matrices.view import View
from .energy import Energy
from .finders import SubspaceFinder
from .gradient import DenseGradient, ProjectedGradient
from .on_refresh import OnRefresh
from .projectors import ProjectorStorage, Stored
from .switch import in_turn


class Subspace(NamedTuple):
    """The checked arguments of `low_rank` that say where the subspace comes from."""

    rank: int
    period: int
    find: SubspaceFinder
    on_refresh: OnRefresh
    key: Any
    storage: ProjectorStorage


class Projections(NamedTuple):
    """The projections of all projected leaves, each field as a tree."""

    projectors: Any  # P
    rotations: Any  # from the previous projectors
    coordinates: Any  # R = PᵀG
    energies: list[Energy]  # of each leaf


def gradient_of(
    projected: Any, views: Sequence[View], context: MatrixContext
) -> DenseGradient | ProjectedGradient:
    """The gradient of the projected leaves: their updates as they are stored, or measurements."""
    if context.measurements is not None:
        return ProjectedGradient(context.measurements, leaf_indices_of(projected), views)
    stored = [view.back(g) for g, view in zip(jax.tree.leaves(projected), views, strict=True)]
    return DenseGradient(stored, views, context.turn.are_live(projected))


def begins_period(count: Int[Array, ""], period: int, accept: Acceptance | None) -> Bool[Array, ""]:
    """Whether this step begins a period."""
    begins = jax.lax.rem(count, jnp.asarray(period, count.dtype)) == 0
    return begins if accept is None else accept.allow_refresh(begins)


def projections_of(
    gradient: DenseGradient | ProjectedGradient,
    subspace: Subspace,
    state: Any,
    is_refresh: Bool[Array, ""],
    projected: optax.Updates,
    context: MatrixContext,
) -> Projections:
    """The projections of this step, on new projectors at a refresh; `state` is a `LowRankState`."""
    accept, turn = context.accept, context.turn
    treedef = jax.tree.structure(projected)
    keys = turn.keys(projected, state.key, state.count // subspace.period)
    rows = gradient.refresh_and_project(
        in_turn(subspace.find, turn),
        is_refresh,
        accepted_by(accept, projected),
        state.count,
        keys,
        stored_projectors(state),
        subspace.storage,
    )
    projectors, rotations, coordinates = (treedef.unflatten([row[i] for row in rows]) for i in range(3))
    return Projections(projectors, rotations, coordinates, [row.energy for row in rows])


def stored_projectors(state: Any) -> list[Stored]:
    """What a `LowRankState` stores of each leaf's projector."""
    trees = map(jax.tree.leaves, (state.projectors, state.projectors_scales))
    return list(zip(*(leaves for leaves in trees if leaves), strict=True))


def trees_of_stored(tree: Any, stored: Sequence[Stored]) -> tuple[Any, Any]:
    """The fields `projectors` and `projectors_scales`, from what is stored of each leaf of `tree`."""
    treedef = jax.tree.structure(tree)
    projectors, *scales = [treedef.unflatten(column) for column in zip(*stored, strict=True)] or [tree]
    return projectors, scales[0] if scales else ()


def accepted_by(accept: Acceptance | None, tree: Any) -> list[Accepted]:
    """Whether each leaf accepts the step."""
    return [jnp.asarray(True)] * len(jax.tree.leaves(tree)) if accept is None else accept.of_leaves(tree)


def measured_before(steps: Any, energies: Sequence[Energy]) -> tuple[Any, list[Energy]]:
    """Steps that wait for the energies, except on a CPU: energies measured at the end would keep every leaf's
    coordinates.
    """
    leaves, treedef = jax.tree.flatten(steps)
    rows = [barrier_but_on_cpu(row) for row in zip(leaves, energies, strict=True)]
    return treedef.unflatten([step for step, _ in rows]), [energy for _, energy in rows]
