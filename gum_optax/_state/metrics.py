"""Reads metrics from an optimizer state."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Scalar

from .._core.checks import is_rule
from .containers import Names, has_numbers, low_rank_places, named_arrays, type_of


def metrics(state: Any) -> dict[str, Scalar | Array]:
    """Read from an optimizer state, at any nesting and at no cost, what GUM did in the last step.

    Args:
      state: an optimizer state, or a container with one: a `TrainState`, an `nnx.Optimizer` or its
        `nnx.state`, a checkpoint restored without a target. If it holds shapes, the result holds shapes.

    Returns:
      A flat dict of scalars, each present where the state has it:

      - `captured_energy`: `|PᵀG|² / |G|²` over the projected blocks;
      - `residual_share`: `|G - P PᵀG| / |G|`, its complement;
      - `refresh_count`: the number of subspaces so far, which is the number of periods begun;
      - `realised_fraction`: sampled blocks over the blocks of sampled groups, `γ/L`;
      - `sampled/64x256/0`: the block in that slot of that group, counted over the group's leaves;
      - `skipped_steps`: the number of steps that some leaf skipped because its gradient was not finite.

    Raises:
      TypeError: `state` is the optimizer.

    Examples:
      >>> tx = gum_optax.gum(1e-3, rank=2, full_rank_fraction=0.25)
      >>> values = gum_optax.metrics(tx.init({"kernel": jnp.ones((4, 4, 8))}))
      >>> print(*sorted(values))
      captured_energy realised_fraction refresh_count residual_share sampled/4x8/0 skipped_steps
      >>> float(values["realised_fraction"])
      0.25
    """
    if is_rule(state):
        raise TypeError(
            "metrics reads the state of an optimizer, got the optimizer: pass the state, such as the"
            " `opt_state` of a TrainState or an nnx.Optimizer."
        )
    arrays = named_arrays(state)
    places = low_rank_places(arrays)
    # A training state also holds the model; read only arrays with the names of optimizer state.
    read = {name: x for name, x in arrays.items() if name[-1:] == ("skipped",) or _is_within(name, places)}
    if all(map(has_numbers, read.values())):
        return _measured(read)
    shapes = {name: jax.ShapeDtypeStruct(*type_of(x)) for name, x in read.items()}
    return jax.eval_shape(_measured, shapes)


def _is_within(name: Names, places: list[Names]) -> bool:
    return any(name[: len(place)] == place for place in places)


def _measured(arrays: dict[Names, Any]) -> dict[str, Scalar | Array]:
    values: dict[str, Any] = {}
    for name, x in arrays.items():
        # The count is an integer, unlike the moments of a parameter with that name.
        if name[-1:] == ("skipped",) and jnp.issubdtype(type_of(x)[1], jnp.integer):
            values["skipped_steps"] = values.get("skipped_steps", 0) + x
    for place in low_rank_places(arrays):
        inside = [(name[len(place) :], x) for name, x in arrays.items() if _is_within(name, [place])]
        projectors = [x for name, x in inside if name[0] == "projectors"]
        if not projectors:
            continue  # nothing is projected, so nothing is lost
        captured = jnp.asarray(arrays[*place, "captured"])
        values["captured_energy"] = captured
        values["residual_share"] = jnp.sqrt(jnp.clip(1 - captured, 0))
        values["refresh_count"] = arrays[*place, "refreshes"]
        # Without groups the index is one number, and its name has no third part.
        index = {name[2]: x for name, x in inside if name[:2] == ("outside", "index") and len(name) == 3}
        if index:
            blocks = sum(math.prod(p.shape[:-2]) for p in projectors)
            values["realised_fraction"] = jnp.float32(sum(i.shape[-1] for i in index.values()) / blocks)
        for group, i in index.items():
            values |= {f"sampled/{group}/{slot}": i[..., slot] for slot in range(i.shape[-1])}
    return {name: jnp.asarray(value) for name, value in values.items()}
