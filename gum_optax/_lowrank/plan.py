"""What the shapes of a tree decide before an update: its plan."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optax
from jaxtyping import Array, Bool, Int, UInt32

from .gradient import DenseGradient, ProjectedGradient


class LowRankStep(NamedTuple):
    """What a step in the subspace is made of."""

    updates: optax.Updates  # G of the projected leaves, a leaf (*, m, n); zeros where nobody forms it
    projectors: Any  # P, a leaf (*, m, r)
    coordinates: Any  # R = PᵀG, a leaf (*, r, n)
    gradient: DenseGradient | ProjectedGradient  # of the projected leaves
    views: Any  # how the leaves are stored
    is_refresh: Bool[Array, ""]  # whether this step begins a period
    count: Int[Array, ""]  # steps before this one  # pyright: ignore[reportIncompatibleMethodOverride]
    key: UInt32[Array, "2"]


def _nothing_beside(step: LowRankStep, state: Any, /, **extra_args: Any) -> tuple[Any, optax.OptState]:
    """For a lift that makes everything of the steps in the subspace."""
    del step, extra_args
    return None, state


class Lift(NamedTuple):
    """How a step in the subspace becomes a full-size step.

    Attributes:
      init: from zeros like the projected leaves to the lift's own state.
      update: `(step, steps, beside, state, *, context, **extra_args) -> (full-size steps, state)` of a
        `LowRankStep` and the rule's steps in the subspace, S, a leaf (*, r, n). All four are positional only,
        because users name their extra arguments as they like.
      begin: `(step, state, *, context, **extra_args) -> (beside, state)`, before the rule takes its steps in
        the subspace: whatever `update` needs and S does not decide.
    """

    init: Callable[[optax.Params], optax.OptState]
    update: Callable[..., tuple[optax.Updates, optax.OptState]]
    begin: Callable[..., tuple[Any, optax.OptState]] = _nothing_beside


class Plan(NamedTuple):
    """What the shapes of a tree decide."""

    is_projected: Sequence[bool]  # of each leaf
    weights: Sequence[float] | None  # factor of each projected leaf's coordinates; `None`: no factor
    lift: Lift
