"""The size of a step, from the shape of the weight."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._checks import check_number
from ._dimensions import WeightDimensionNumbers, views_of


def scale_by_shape(
    weight_dimension_numbers: WeightDimensionNumbers = None, consistent_rms: Any = 0.2
) -> optax.GradientTransformation:
    """Scale an orthogonal step by the shape of the full weight.

        consistent_rms · √max(fan_in, fan_out)      (Moonlight), or with `None`
        √max(1, fan_out / fan_in)                   (Jordan)

    Args:
      weight_dimension_numbers: as in `as_matrices`.
      consistent_rms: the RMS of the scaled step's elements, for a full-rank orthogonal step; 0.2 is
        AdamW's, so that one learning rate serves both (Moonlight, arXiv 2502.16982, section 2.2).

    Returns:
      A stateless transformation over leaves in the axes of the model.

    Raises:
      TypeError, ValueError: `consistent_rms` is not a number of at least 0, or a leaf is no matrix.
    """
    if consistent_rms is not None:
        check_number("consistent_rms", consistent_rms, at_least=0)

    def factor(view):
        if consistent_rms is None:
            return max(1.0, view.fan_out / view.fan_in) ** 0.5
        return consistent_rms * max(view.fan_in, view.fan_out) ** 0.5

    def scale(updates, params):
        del params
        views = views_of(weight_dimension_numbers, updates, wide=False)
        return jax.tree.map(lambda u, view: jnp.asarray(factor(view), u.dtype) * u, updates, views)

    return optax.stateless(scale)
