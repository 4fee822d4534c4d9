"""What becomes of a rule's state when the subspace changes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from .._core.trees import is_masked, is_state_field
from .._core.xla import if_needed
from .._linalg.numerics import exact_matmul
from .._transforms.storage import QuantizedTrace

# `(inner, its state, zeros like the coordinates, rotation P_newᵀ P_old, whether this step is a refresh)
# -> its state for the subspace of this step`.
OnRefresh = Callable[[Any, Any, Any, Any, Any], Any]


def keep(inner: Any, state: Any, coordinates: Any, rotation: Any, is_refresh: Any) -> Any:
    """The state stays: coordinates in the old subspace count as coordinates in the new one (GaLore).

    Examples:
      >>> state = optax.TraceState(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      >>> rotation = jnp.array([[0.0, 1.0], [1.0, 0.0]])  # P_newᵀ P_old: the columns change places
      >>> kept = gum_optax.keep(optax.trace(0.9), state, jnp.zeros((2, 2)), rotation, jnp.asarray(True))
      >>> kept.trace.tolist()
      [[1.0, 2.0], [3.0, 4.0]]
    """
    del inner, coordinates, rotation, is_refresh
    return state


def _rotated(
    is_refresh: Bool[Array, ""], rotation: Float[Array, "*b r r"], m: Float[Array, "*b r n"]
) -> Float[Array, "*b r n"]:
    """`rotation m` at a refresh; on other steps the rotation is the identity."""
    return if_needed(is_refresh, lambda q, m: exact_matmul(q, m).astype(m.dtype), rotation, m)


def rotate(inner: Any, state: Any, coordinates: Any, rotation: Any, is_refresh: Any) -> Any:
    """Every accumulator follows the subspace: `M ← (P_newᵀ P_old) M` (SUMO).

    This is right for accumulators that are linear in the gradient, such as that of `optax.trace`; a second
    moment is not linear. Leaves of inner's state without the coordinates' shape, such as norms, stay.

    Examples:
      >>> state = optax.TraceState(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      >>> rotation = jnp.array([[0.0, 1.0], [1.0, 0.0]])  # P_newᵀ P_old: the columns change places
      >>> new = gum_optax.rotate(optax.trace(0.9), state, jnp.zeros((2, 2)), rotation, jnp.asarray(True))
      >>> new.trace.tolist()
      [[3.0, 4.0], [1.0, 2.0]]
    """

    def follow(m, q, r):
        if is_masked(m):
            return m
        is_accumulator = m.shape == r.shape and jnp.issubdtype(m.dtype, jnp.floating)
        return _rotated(is_refresh, q, m) if is_accumulator else m

    def follow_codes(node):
        return node.rotated(is_refresh, rotation) if isinstance(node, QuantizedTrace) else node

    state = optax.tree.map_params(inner, follow, state, rotation, coordinates, is_leaf=is_masked)
    return jax.tree.map(follow_codes, state, is_leaf=lambda node: isinstance(node, QuantizedTrace))


def rotate_first_moment(inner: Any, state: Any, coordinates: Any, rotation: Any, is_refresh: Any) -> Any:
    """Adam's mean follows the subspace, `M ← (P_newᵀ P_old) M`; its squares stay (GoLore).

    For an inner rule whose state has one field `mu`, as those of `optax.scale_by_adam` and its kin.

    Raises:
      ValueError: there is no such field.
      KeyError: there are several.

    Examples:
      >>> inner, m = optax.scale_by_adam(), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> state, rotation = inner.init(m)._replace(mu=m, nu=m), jnp.array([[0.0, 1.0], [1.0, 0.0]])
      >>> new = gum_optax.rotate_first_moment(inner, state, jnp.zeros((2, 2)), rotation, jnp.asarray(True))
      >>> new.mu.tolist(), new.nu.tolist()
      ([[3.0, 4.0], [1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]])
    """
    del inner
    if not jax.tree.leaves(coordinates):
        return state  # a tree without leaves has no field either
    mean = optax.tree.get(state, "mu", filtering=is_state_field)
    if mean is None:
        raise ValueError(
            f"rotate_first_moment needs a state with a field mu, got {type(state).__name__}; use rotate."
        )
    return optax.tree.set(
        state, is_state_field, mu=jax.tree.map(functools.partial(_rotated, is_refresh), rotation, mean)
    )


# These functions do not change the state of a leaf whose subspace has not changed.
FOLLOWING = (keep, rotate, rotate_first_moment)


def restart(inner: Any, state: Any, coordinates: Any, rotation: Any, is_refresh: Any) -> Any:
    """The state starts again from `inner.init` (GUM).

    Examples:
      >>> state = optax.TraceState(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      >>> new = gum_optax.restart(optax.trace(0.9), state, jnp.zeros((2, 2)), jnp.eye(2), jnp.asarray(True))
      >>> new.trace.tolist()
      [[0.0, 0.0], [0.0, 0.0]]
    """
    del rotation
    # XLA makes a choice entry by entry where it next reads the state; a branch would copy the state.
    return jax.tree.map(lambda new, old: jnp.where(is_refresh, new, old), inner.init(coordinates), state)
