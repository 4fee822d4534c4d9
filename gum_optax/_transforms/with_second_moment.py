"""A second moment that does not start at zero."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from .._core.checks import check_function, check_number, check_rule
from .._core.full_shapes import full_shapes
from .._core.keys import check_key, key_data, typed

# `(key, shape of a matrix or of its coordinates, fan-in + fan-out of the weight) -> V₀`.
Start = Callable[[PRNGKeyArray, tuple[int, int], int], Float[Array, "m n"]]


def xavier_squares(scale: Any = 1.0) -> Start:
    """`V₀ = σ E²` with `E` from Xavier's normal distribution: `σ 2/(fan_in + fan_out) χ²₁` for each number.

    This is the authors' code. Their poster prints half of it.

    Args:
      scale: `σ`. The authors use 100 for convolutional networks, 1 for LSTMs, 1 and 100 for transformers.

    Raises:
      TypeError, ValueError: `scale` is no number of at least 0.

    Examples:
      >>> start = gum_optax.xavier_squares(scale=128.0)
      >>> v = start(jax.random.key(0), (64, 64), 128)  # σ 2 / (fan_in + fan_out) = 2
      >>> bool((v >= 0).all()), round(float(v.mean()))
      (True, 2)
    """
    scale = check_number("scale", scale, at_least=0)

    def start(key: PRNGKeyArray, shape: tuple[int, int], fans: int) -> Float[Array, "m n"]:
        return scale * 2 / fans * jnp.square(jax.random.normal(key, shape, jnp.float32))

    return start


def with_second_moment(
    inner: optax.GradientTransformation, start: Start | None = None, key: int | jax.Array = 0
) -> optax.GradientTransformationExtraArgs:
    """Start the second moment of a rule at `V₀` in place of zero.

        V ← β₂ V + (1 - β₂) G²   from   V = V₀

    All else is as it was. With Adam's correction of the bias the first denominator is
    `√(G² + β₂/(1 - β₂) V₀)`: at `β₂ = 0.999` the start counts 999 times. It lasts until `β₂ᵗ V₀` is small
    beside the squares of the gradients, about 10⁴ steps there; before, the rule is close to SGD with momentum
    at another rate. Tune the learning rate for it.

    Under `low_rank` the fans are those of the full weight, and `restart` starts at `V₀` again.

    Args:
      inner: any rule whose state has fields `nu` in floating point, such as `optax.scale_by_adam`.
      start: `(key, shape, fans) -> V₀` for the shape of a matrix, or of its coordinates in a subspace;
        `xavier_squares()` by default. `fans` is fan-in plus fan-out, those of the last two axes: inside
        `matrix_optimizer` every leaf is seen as matrices. Matrices of one shape start alike, in whatever
        stack they are. Vectors and numbers start at zero.
      key: an integer seed or a JAX key.

    Returns:
      A transformation with the state of `inner`.

    Raises:
      TypeError, ValueError: an argument is of the wrong type; at `init`, the state has no such field.

    Examples:
      >>> inner = gum_optax.with_second_moment(optax.scale_by_adam())
      >>> rule = gum_optax.low_rank(inner, 2, 200, on_refresh=gum_optax.restart)
      >>> state = rule.init({"kernel": jnp.ones((4, 8))})
      >>> bool((state.low.nu["kernel"] > 0).all()), bool(state.low.mu["kernel"].any())
      (True, False)

    References:
      Abuduweili and Liu, arXiv 2412.02153, and Walleclipse/Adam_Initialization at fd68828.
    """
    taking = optax.with_extra_args_support(check_rule("inner", inner))
    draw = check_function("start", start or xavier_squares(), "gum_optax.xavier_squares()")
    check_key(key)

    def init(params):
        state, own = inner.init(params), typed(key_data(key))
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        shapes = dict(zip(paths, full_shapes(params), strict=True))
        moments = 0

        def started(path, x):
            nonlocal moments
            if (leaf := _of_second_moment(path, shapes)) is None:
                return x
            moments += 1
            return _started(x, shapes[leaf], draw, own)

        state = jax.tree_util.tree_map_with_path(started, state)
        if moments < len(shapes):
            raise ValueError(
                "with_second_moment needs a rule whose state has a field nu for every leaf, as that of"
                f" optax.scale_by_adam, got {type(state).__name__}."
            )
        return state

    return optax.GradientTransformationExtraArgs(init, taking.update)


def _of_second_moment(path: tuple[Any, ...], leaves: Any) -> Any:
    """The path of the parameter whose second moment stands at a path of the state, or `None`."""
    for i, key in enumerate(path):
        is_field = isinstance(key, jax.tree_util.GetAttrKey) and key.name == "nu"
        if is_field and path[i + 1 :] in leaves:
            return path[i + 1 :]
    return None


def _started(nu: Array, full: tuple[int, ...], draw: Start, key: PRNGKeyArray) -> Array:
    """`nu`, which is zero, at its start; vectors stay."""
    if not jnp.issubdtype(nu.dtype, jnp.floating):
        raise ValueError(f"with_second_moment needs a field nu of floating-point numbers, got {nu.dtype}.")
    if nu.ndim < 2:
        return nu
    return nu + draw(key, (nu.shape[-2], nu.shape[-1]), max(1, full[-2] + full[-1])).astype(nu.dtype)
