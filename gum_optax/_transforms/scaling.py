"""The size of a step: factors from the shape of the weight, and a limit from the previous step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._core.checks import check_number
from .._linalg.numerics import frobenius, safe_reciprocal
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._matrices.parts import Apart
from .._matrices.view import views_of


def shape_factor(consistent_rms: Any = 0.2) -> Callable[[int, int], Any]:
    """The factor of an orthogonal step as a function of the fan-in and fan-out of the full weight.

        consistent_rms · √max(fan_in, fan_out)      (Moonlight), or with `None`
        √max(1, fan_out / fan_in)                   (Jordan)

    Args:
      consistent_rms: the RMS of the elements of a scaled full-rank orthogonal step. The default 0.2 is
        AdamW's, so that one learning rate serves both (Moonlight, arXiv 2502.16982, section 2.2).

    Raises:
      TypeError, ValueError: `consistent_rms` is not a number of at least 0.

    Examples:
      >>> gum_optax.shape_factor(0.2)(4, 16), gum_optax.shape_factor(None)(4, 16)
      (0.8, 2.0)
    """
    if consistent_rms is not None:
        consistent_rms = check_number("consistent_rms", consistent_rms, at_least=0)

    def factor(fan_in: int, fan_out: int) -> Any:
        if consistent_rms is None:
            return max(1.0, fan_out / fan_in) ** 0.5
        return consistent_rms * max(fan_in, fan_out) ** 0.5

    return factor


def fan_ratio(fan_in: int, fan_out: int) -> float:
    """`√(fan_out / fan_in)`: gives an orthogonal step the operator norm 1 between RMS norms.

    Examples:
      >>> gum_optax.fan_ratio(4, 16)
      2.0
    """
    return (fan_out / fan_in) ** 0.5


def scale_by_shape(
    weight_dimension_numbers: WeightDimensionNumbers = None, consistent_rms: Any = 0.2
) -> optax.GradientTransformation:
    """Scale an orthogonal step by the `shape_factor` of the full weight.

    Args:
      weight_dimension_numbers: as in `as_matrices`.
      consistent_rms: as in `shape_factor`.

    Returns:
      A stateless transformation over leaves with the axes of the model.

    Raises:
      TypeError, ValueError: `consistent_rms` is not a number of at least 0, or a leaf is no matrix.

    Examples:
      >>> rule, steps = gum_optax.scale_by_shape(consistent_rms=0.25), {"kernel": jnp.ones((4, 16))}
      >>> steps, state = rule.update(steps, rule.init(steps))
      >>> float(steps["kernel"][0, 0])  # 0.25 √16
      1.0
    """
    return scale_by_fans(weight_dimension_numbers, shape_factor(consistent_rms))


def scale_by_fans(
    weight_dimension_numbers: WeightDimensionNumbers, factor: Callable[[int, int], Any]
) -> optax.GradientTransformation:
    """Scale each matrix by `factor(fan_in, fan_out)`."""

    def scale(updates, params):
        del params
        kernels = Apart(weight_dimension_numbers, updates)
        parts = kernels.apart(updates)
        views = views_of(kernels.entries, parts, wide=False)
        scaled = jax.tree.map(
            lambda u, view: jnp.asarray(factor(view.fan_in, view.fan_out), u.dtype) * u, parts, views
        )
        return kernels.together(scaled)

    return optax.stateless(scale)


class LimitNormGrowthState(NamedTuple):
    """State of `limit_norm_growth`.

    Examples:
      >>> rule, steps = gum_optax.limit_norm_growth(), {"kernel": jnp.ones((3, 4, 4))}
      >>> steps, state = rule.update(steps, rule.init(steps))
      >>> state.norms["kernel"].tolist()
      [4.0, 4.0, 4.0]
    """

    norms: optax.Updates  # each leaf (*,) float32: the norm of each block's last step, 0 before the first


def limit_norm_growth(ratio: Any = 1.1) -> optax.GradientTransformation:
    """Let the norm of each block's step grow by at most `ratio` from one step to the next.

        if |O| > ratio |O_prev|:   O ← O ratio |O_prev| / |O|

    The first step and a step after a zero step are not limited. After an exact orthogonalizer and a momentum
    of full rank, the limit never acts: the norm is always `√r`. (SUMO, arXiv 2505.24749, Algorithm 1, ratio
    1.1.)

    Args:
      ratio: at least 1.

    Raises:
      TypeError, ValueError: `ratio` is not a number of at least 1.

    Examples:
      >>> rule, steps = gum_optax.limit_norm_growth(1.5), {"kernel": jnp.ones((4, 4))}
      >>> _, state = rule.update(steps, rule.init(steps))
      >>> limited, state = rule.update({"kernel": jnp.full((4, 4), 10.0)}, state)
      >>> round(float(limited["kernel"][0, 0]), 3)
      1.5
    """
    ratio = check_number("ratio", ratio, at_least=1)

    def init(params):
        return LimitNormGrowthState(jax.tree.map(lambda x: jnp.zeros(x.shape[:-2], jnp.float32), params))

    def update(updates, state, params=None):
        del params

        def limited(length, previous):
            length = length[..., 0, 0]
            return jnp.where(previous > 0, jnp.minimum(length, ratio * previous), length)

        def scaled(o, length, limit):
            return (o * (limit[..., None, None] * safe_reciprocal(length))).astype(o.dtype)

        lengths = jax.tree.map(frobenius, updates)
        limits = jax.tree.map(limited, lengths, state.norms)
        return jax.tree.map(scaled, updates, lengths, limits), LimitNormGrowthState(limits)

    return optax.GradientTransformation(init, update)
