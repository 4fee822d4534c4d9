"""What the shapes of a tree decide before an update: its plan."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optax
from jaxtyping import Array, Bool, Int, UInt32

from .gradient import DenseGradient, ProjectedGradient


class LowRankStep(NamedTuple):
    """A step in the subspace, and what it is made of."""

    updates: optax.Updates  # G of the projected leaves, a leaf (*, m, n); zeros where nobody forms it
    projectors: Any  # P, a leaf (*, m, r)
    coordinates: Any  # R = PᵀG, a leaf (*, r, n)
    steps: Any  # S, a leaf (*, r, n)
    gradient: DenseGradient | ProjectedGradient  # of the projected leaves
    views: Any  # how the leaves are stored
    is_refresh: Bool[Array, ""]  # whether this step begins a period
    count: Int[Array, ""]  # steps before this one  # pyright: ignore[reportIncompatibleMethodOverride]
    key: UInt32[Array, "2"]


class Lift(NamedTuple):
    """How a step in the subspace becomes a full-size step.

    Attributes:
      init: from zeros like the projected leaves to the lift's own state.
      update: `(step, state, *, context, **extra_args) -> (full-size steps, state)` of a `LowRankStep`.
    """

    init: Callable[[optax.Params], optax.OptState]
    update: Callable[..., tuple[optax.Updates, optax.OptState]]


class Plan(NamedTuple):
    """What the shapes of a tree decide."""

    is_projected: Sequence[bool]  # of each leaf
    weights: Sequence[float] | None  # factor of each projected leaf's coordinates; `None`: no factor
    lift: Lift
