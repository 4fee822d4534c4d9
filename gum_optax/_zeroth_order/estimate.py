"""An estimate of the gradient from values of the loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.checks import check_function, check_integer, check_number
from .._linalg.numerics import wide_dtype
from .directions import Directions, check_directions, drawn, gaussian, scalar


def estimate(
    loss: Callable[[Any], Float[Array, ""]],
    params: Any,
    key: Any,
    step: Any = 0,
    *,
    epsilon: Any = 1e-3,
    queries: int = 1,
    directions: Directions = gaussian,
) -> tuple[Float[Array, ""], Any]:
    """The loss and an estimate of its gradient, without a backward pass, for any optimizer.

        ρ = (f(θ + ε Z) - f(θ - ε Z)) / 2ε,   or with `epsilon=None` the exact slope <∇f, Z> in forward mode
        gradient = mean over the queries of ρ Z

    Its mean is the gradient, and its squared norm is `d + 2` times the gradient's for `d` parameters and one
    query: take small steps.

    No activations are kept. In memory are the estimate, one direction, and the moved parameters;
    `project_loss` needs none of these. The estimate of one query from `low_rank_directions` has rank `r`, and
    that of `gaussian` ones full rank: a subspace that an optimizer finds in it is that of the noise.

    Args:
      loss: a function of the parameters; the same batch and the same dropout for all its values.
      params: the parameters that are trained; close over frozen ones.
      key: an integer seed or a JAX key; one serves a whole run.
      step: the number of the step, an integer; may be traced.
      epsilon: `ε`; 1e-3 as in MeZO. `None`: forward mode, which has no `ε` to tune. Weights in bfloat16 want
        it: rounding swallows most of `ε Z`.
      queries: how many directions; 1 as in MeZO. It may not grow in a compiled step; AdaZeta's schedule,
        `min(max(⌊s eᵖ⌋, 1), Q)` at epoch `e`, compiles once for each number.
      directions: `gaussian` or `low_rank_directions(rank, period)`.

    Returns:
      The mean of the values, or the loss itself in forward mode, and a tree like `params`.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type.

    Examples:
      >>> loss = lambda params: jnp.sum(params["w"] ** 2)
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> value, gradients = gum_optax.estimate(loss, params, key=0, queries=1000)
      >>> round(float(value), 2), gradients["w"].round().tolist()  # the gradient is 2 w
      (5.0, [2.0, -4.0])

    References:
      Malladi et al., MeZO, arXiv 2305.17333; Baydin et al., arXiv 2202.08587, for forward mode; Yang et al.,
      AdaZeta, arXiv 2406.18060.
    """
    queries = check_integer("queries", queries, at_least=1)
    check_function("loss", loss, "a function of the parameters")
    directions = check_directions(directions)
    if epsilon is not None:
        epsilon = check_number("epsilon", epsilon, at_least=1e-30)

    def ahead(z, size):
        return jax.tree.map(lambda x, d: (x.astype(d.dtype) + size * d).astype(x.dtype), params, z)

    def slope_along(z):
        if epsilon is None:
            tangents = jax.tree.map(lambda x, d: d.astype(x.dtype), params, z)
            return jax.jvp(lambda params: scalar(loss(params)), (params,), (tangents,))
        up, down = (scalar(loss(ahead(z, size))) for size in (epsilon, -epsilon))
        return (up + down) / 2, (up - down) / (2 * epsilon)

    def add_query(found, query):
        value, gradient = found
        z = drawn(params, key, step, query, directions)
        own, slope = slope_along(z)
        gradient = jax.tree.map(lambda g, d: g + (slope * d / queries).astype(g.dtype), gradient, z)
        return (value + own / queries, gradient), None

    params = jax.tree.map(jnp.asarray, params)
    value = jax.eval_shape(lambda params: scalar(loss(params)), params)
    start = jnp.zeros((), value.dtype), jax.tree.map(lambda x: jnp.zeros_like(x, wide_dtype(x)), params)
    (value, gradient), _ = jax.lax.scan(add_query, start, jnp.arange(queries))
    return value, jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, params)
