"""Zeroth-order steps in the memory of inference: parameters walk along a direction and back, in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.checks import check_function, check_number
from .._core.xla import after
from .._linalg.rounding import ROUNDED
from .directions import Directions, check_directions, gaussian, leaf_keys, moved, scalar


def walk(params: Any, key: Any, size: Any, step: Any = 0, *, directions: Directions = gaussian) -> Any:
    """`θ + size · Z`, with the direction `Z` of this key and step, in place if `params` is donated.

    With `size = -η · slope` it is a step of SGD on the gradient that `estimate` would return, which nobody
    forms: see `project_loss`.

    Args:
      params: the parameters.
      key: an integer seed or a JAX key; one serves a whole run.
      size: a number, or a traced one.
      step: the number of the step, an integer; may be traced.
      directions: `gaussian` or `low_rank_directions(rank, period)`.

    Returns:
      The new parameters, in the dtypes of `params`.

    Raises:
      TypeError: `key` is no threefry key or seed, `step` is no integer, or a leaf has no real floating-point
        numbers.

    Examples:
      >>> there = gum_optax.walk({"w": jnp.ones((2, 2))}, key=0, size=1.0)
      >>> back = gum_optax.walk(there, key=0, size=-1.0)
      >>> bool(jnp.ptp(there["w"]) > 0.1), bool(jnp.ptp(back["w"]) < 1e-5)
      (True, True)
    """
    directions = check_directions(directions)
    keys, step = leaf_keys(params, key, step)
    leaves, treedef = jax.tree.flatten(params)
    rows = zip(leaves, keys, strict=True)
    return treedef.unflatten([moved(jnp.asarray(x), size, own, (step, 0), directions) for x, own in rows])


def project_loss(
    loss: Callable[[Any], Float[Array, ""]],
    params: Any,
    key: Any,
    step: Any = 0,
    *,
    epsilon: Any = 1e-3,
    directions: Directions = gaussian,
) -> tuple[Float[Array, ""], Float[Array, ""], Any]:
    """The slope of the loss along a random direction, with no memory but that of the loss.

        slope = (f(θ + ε Z) - f(θ - ε Z)) / 2ε

    The parameters walk to both places and back in place; the direction is drawn again each time. So a
    training step needs what inference needs, and one scalar. With a `walk` down the slope this is MeZO. A
    gradient for another optimizer is `estimate`'s, which costs the memory of a gradient and of the moved
    parameters.

    Args:
      loss: a function of the parameters; the same batch and the same dropout at both places.
      params: the parameters that are trained, of at least float32; close over frozen ones.
      key: an integer seed or a JAX key; one serves a whole run.
      step: the number of the step, an integer; may be traced.
      epsilon: `ε`; 1e-3 as in MeZO.
      directions: `gaussian` or `low_rank_directions(rank, period)`.

    Returns:
      The mean of the two losses, the slope, and the parameters, back at their place to rounding: donate
      those that go in. A slope that is not finite is zero, so that `walk` stays.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type; the loss is no number; a leaf
        is bfloat16 or float16, which walking there and back would change for good.

    Examples:
      >>> loss = lambda params: jnp.sum(params["w"] ** 2)
      >>> value, slope, params = gum_optax.project_loss(loss, {"w": jnp.ones((2, 2))}, key=0, step=0)
      >>> params = gum_optax.walk(params, 0, -0.01 * slope, step=0)
      >>> round(float(value), 2), bool(loss(params) < value)
      (4.0, True)

    References:
      Malladi et al., MeZO, arXiv 2305.17333, Algorithm 1.
    """
    if epsilon is None:
        raise TypeError("epsilon must be a number: forward mode is estimate's.")
    epsilon = check_number("epsilon", epsilon, at_least=1e-30)
    check_function("loss", loss, "a function of the parameters")
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if jnp.result_type(x) in ROUNDED:
            raise ValueError(
                f"leaf {jax.tree_util.keystr(path)} is {jnp.result_type(x)}: walking there and back would"
                " change it for good. Use float32 parameters, or estimate with epsilon=None."
            )
    params = walk(params, key, epsilon, step, directions=directions)
    up = scalar(loss(params))
    # Each walk waits for the loss before it, by the data: else XLA would copy the parameters.
    params = walk(params, key, after(jnp.asarray(-2 * epsilon), up), step, directions=directions)
    down = scalar(loss(params))
    params = walk(params, key, after(jnp.asarray(epsilon), down), step, directions=directions)
    slope = (up - down) / (2 * epsilon)
    return (up + down) / 2, jnp.where(jnp.isfinite(slope), slope, 0), params
