"""What becomes of the gradient outside the subspace: nothing, the gradient itself, or the step of a rule."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, Float

from .._core.batches import map_sequentially
from .._core.checks import check_residual, is_rule
from .._core.xla import add_product
from .._linalg.numerics import norm, safe_reciprocal
from .._linalg.orthonormal import lift, outside
from .gradient import ProjectedGradient
from .plan import Lift, LowRankStep

# A function (gradient, projector, coordinates R, inner step S) -> full-size step, or a rule for `G - P R`.
Residual = Callable[[Array, Array, Array, Array], Array] | optax.GradientTransformation


def drop(
    g: Float[Array, "*b m n"],
    p: Float[Array, "*b m r"],
    r: Float[Array, "*b r n"],
    s: Float[Array, "*b r n"],
) -> Float[Array, "*b m n"]:
    """Drop what lies outside the subspace: `P S` (GaLore).

    Examples:
      >>> g, p = jnp.full((3, 2), 4.0), jnp.eye(3, 1)
      >>> r, s = p.T @ g, jnp.ones((1, 2))
      >>> gum_optax.drop(g, p, r, s).tolist()
      [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    """
    del g, r
    return lift(p, s)


def add_raw(
    g: Float[Array, "*b m n"],
    p: Float[Array, "*b m r"],
    r: Float[Array, "*b r n"],
    s: Float[Array, "*b r n"],
) -> Float[Array, "*b m n"]:
    """Add what lies outside unchanged: `P S + (G - P R) = G + P (S - R)` (SUMO, as printed).

    Examples:
      >>> g, p = jnp.full((3, 2), 4.0), jnp.eye(3, 1)
      >>> r, s = p.T @ g, jnp.ones((1, 2))
      >>> gum_optax.add_raw(g, p, r, s).tolist()
      [[1.0, 1.0], [4.0, 4.0], [4.0, 4.0]]
    """
    return add_product(g, p, s - r)


def scale_as_inside() -> optax.GradientTransformationExtraArgs:
    """Scale each column of the residual as the rule inside the subspace scaled its column.

        φⱼ = |S[:, j]| / |R[:, j]|,   step[:, j] = φⱼ (G - P R)[:, j]

    A rule for `low_rank(residual=...)`, which passes `coordinates` (R) and `steps` (S). No state.
    (Fira, arXiv 2410.01623, equation 8.)

    Examples:
      >>> rule, rest = gum_optax.scale_as_inside(), jnp.array([[0.0, 0.0], [2.0, 4.0]])
      >>> r, s = jnp.array([[4.0, 1.0]]), jnp.array([[1.0, 2.0]])  # factors 1/4 and 2
      >>> steps, _ = rule.update(rest, rule.init(rest), coordinates=r, steps=s)
      >>> steps.round(3).tolist()
      [[0.0, 0.0], [0.5, 8.0]]
    """

    def update(updates, state, params=None, **extra_args):
        del state, params
        if "steps" not in extra_args:
            raise ValueError(
                "scale_as_inside is a rule for low_rank(residual=...), which passes it the steps."
            )

        def scaled(x, r, s):
            return x * (norm(s, -2) * safe_reciprocal(norm(r, -2)))

        return jax.tree.map(
            scaled, updates, extra_args["coordinates"], extra_args["steps"]
        ), optax.EmptyState()

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def lift_with(residual: Residual) -> Lift:
    """The lift of `low_rank`: `P S`, and what a residual of either kind makes of the rest."""
    check_residual(residual)
    return _lift_with_rule(residual) if is_rule(residual) else _lift_with_function(residual)


def _lift_with_function(residual: Any) -> Lift:
    """The residual makes the full-size step of each leaf."""

    def update(step: LowRankStep, steps, beside, state, /, *, context, **extra_args):
        del beside, context, extra_args
        if residual is not drop:
            _check_dense(step)
        if jax.tree.leaves(state):
            raise ValueError(
                "state.outside holds arrays of a residual that is a rule, but this residual is a function:"
                " make the state by init."
            )
        return map_sequentially(residual, step.updates, step.projectors, step.coordinates, steps), state

    return Lift(optax.init_empty_state, update)


def _lift_with_rule(residual: Any) -> Lift:
    """The residual runs on `G - P R`, and its step is added to `P S`."""
    rule = optax.with_extra_args_support(residual)

    def update(step: LowRankStep, steps, beside, state, /, **extra_args):
        del beside
        _check_dense(step)
        extra_args |= {"coordinates": step.coordinates, "steps": steps}
        rest = map_sequentially(lambda g, p: outside(p, g), step.updates, step.projectors)
        rest, state = rule.update(rest, state, None, **extra_args)
        return map_sequentially(add_product, rest, step.projectors, steps), state

    return Lift(rule.init, update)


def _check_dense(step: LowRankStep) -> None:
    if isinstance(step.gradient, ProjectedGradient):
        raise ValueError(
            "residual needs the gradient outside the subspace, which projected_update never forms;"
            " pass residual=gum_optax.drop."
        )
