"""What becomes of the gradient outside the subspace: nothing, its raw self, or the step of a rule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Bool, Float, Int, UInt32

from .._core.checks import check_residual, is_rule
from .._core.xla import map_in_turn
from .._linalg.numerics import inverse, norm
from .._linalg.orthonormal import lift, outside
from .gradient import Sketched

# A choice (gradient, projector, coordinates R, inner step S) -> full-size step, or a rule for `G - P R`.
Residual = Callable[[Array, Array, Array, Array], Array] | optax.GradientTransformation


def drop(
    g: Float[Array, "*b m n"],
    p: Float[Array, "*b m r"],
    r: Float[Array, "*b r n"],
    s: Float[Array, "*b r n"],
) -> Float[Array, "*b m n"]:
    """What lies outside the subspace is dropped: `P S` (GaLore)."""
    del g, r
    return lift(p, s)


def add_raw(
    g: Float[Array, "*b m n"],
    p: Float[Array, "*b m r"],
    r: Float[Array, "*b r n"],
    s: Float[Array, "*b r n"],
) -> Float[Array, "*b m n"]:
    """What lies outside is added as it is: `P S + (G - P R) = G + P (S - R)` (SUMO, as printed)."""
    return g + lift(p, s - r)


def scale_as_inside() -> optax.GradientTransformationExtraArgs:
    """Scale each column of the residual as the rule inside the subspace scaled its column.

        φⱼ = |S[:, j]| / |R[:, j]|,   step[:, j] = φⱼ (G - P R)[:, j]

    A rule for `low_rank(residual=...)`, which passes `coordinates` (R) and `steps` (S). No state.
    (Fira, arXiv 2410.01623, equation 8.)
    """

    def update(updates, state, params=None, **told):
        del params
        if "steps" not in told:
            raise ValueError(
                "scale_as_inside is a rule for low_rank(residual=...), which tells it the steps."
            )

        def scaled(x, r, s):
            return x * (norm(s, -2) * inverse(norm(r, -2)))

        return jax.tree.map(scaled, updates, told["coordinates"], told["steps"]), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


class Told(NamedTuple):
    """What `low_rank` tells of a step to whatever makes the full-size step of it."""

    projectors: Any  # P, a leaf (*, m, r)
    coordinates: Any  # R = PᵀG, a leaf (*, r, n)
    steps: Any  # S, a leaf (*, r, n)
    gradient: Any  # of the projected leaves, `Held` or `Sketched`
    views: Any  # how leaves are seen as `(*, m, n)`
    due: Bool[Array, ""]  # whether this step begins a period
    count: Int[Array, ""]  # steps before this one  # pyright: ignore[reportIncompatibleMethodOverride]
    key: UInt32[Array, "2"]


def stepping(residual: Any) -> optax.GradientTransformationExtraArgs:
    """From the gradient and what the subspace made of it to the full-size step.

    Either kind of residual as one transformation; its `update` takes `told` besides.
    """
    check_residual(residual)

    def check_held(told):
        if residual is not drop and isinstance(told.gradient, Sketched):
            raise ValueError(
                "residual needs the gradient outside the subspace, which projected_update never forms;"
                " pass residual=gum_optax.drop."
            )

    if not is_rule(residual):

        def choose(updates, state, params=None, *, told, **extra_args):
            del params, extra_args
            check_held(told)
            if jax.tree.leaves(state):
                raise ValueError("the state holds arrays of a rule outside the subspace, and there is none.")
            return map_in_turn(residual, updates, told.projectors, told.coordinates, told.steps), state

        return optax.GradientTransformationExtraArgs(optax.init_empty_state, choose)  # pyright: ignore[reportArgumentType]

    rule = optax.with_extra_args_support(residual)

    def add(updates, state, params=None, *, told, **extra_args):
        check_held(told)
        extra_args |= {"coordinates": told.coordinates, "steps": told.steps}
        rest = map_in_turn(lambda g, p: outside(p, g), updates, told.projectors)
        rest, state = rule.update(rest, state, params, **extra_args)
        return map_in_turn(lambda p, x, s: lift(p, s) + x, told.projectors, rest, told.steps), state

    return optax.GradientTransformationExtraArgs(rule.init, add)  # pyright: ignore[reportArgumentType]
