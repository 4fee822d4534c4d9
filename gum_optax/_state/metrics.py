"""Reads metrics from an optimizer state."""

import itertools
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
      A flat dict of scalars, each present where the state has it; the stacked states of several runs, as
      `jax.vmap` makes them, have one number a run:

      - `captured_energy`: `|PᵀG|² / |G|²` over the projected blocks;
      - `residual_share`: `|G - P PᵀG| / |G|`, its complement;
      - `refresh_count`: the number of subspaces so far, which is the number of periods begun;
      - `realised_fraction`: sampled blocks over the blocks of sampled groups, `γ/L`;
      - `sampled/64x256/0`: the block in that slot of that group, counted over the group's leaves;
      - `skipped_steps`: the number of steps that some leaf skipped because its gradient was not finite.

      If the state has several low-rank rules, as under `optax.partition`, each rule has its own keys, such as
      `near/captured_energy` for the rule with the label `near`. They begin with the path to the rule's state,
      without the names that all these paths begin with or end with. `skipped_steps` is a sum.

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
    rules = {}
    for place in low_rank_places(arrays):
        inside = {name[len(place) :]: x for name, x in arrays.items() if _is_within(name, [place])}
        if any(name[0] == "projectors" for name in inside):  # if nothing is projected, nothing is lost
            rules[place] = _of_low_rank(inside)
    for own, found in zip(_differing(list(rules)), rules.values(), strict=True):
        values |= {"/".join((*own, key)): x for key, x in found.items()}
    return {name: jnp.asarray(value) for name, value in values.items()}


def _of_low_rank(arrays: dict[Names, Any]) -> dict[str, Any]:
    """The metrics of one low-rank rule, from the arrays of its state."""
    captured = jnp.asarray(arrays["captured",])
    values = {
        "captured_energy": captured,
        "residual_share": jnp.sqrt(jnp.clip(1 - captured, 0)),
        "refresh_count": arrays["refreshes",],
    }
    # Without groups the index is one number, and its name has no third part.
    index = {name[2]: x for name, x in arrays.items() if name[:2] == ("outside", "index") and len(name) == 3}
    if index:
        # Stacked states of several runs have as many values of everything.
        projectors = [x for name, x in arrays.items() if name[0] == "projectors"]
        blocks = sum(math.prod(p.shape[captured.ndim : -2]) for p in projectors)
        sampled = sum(i.shape[-1] for i in index.values())
        values["realised_fraction"] = jnp.full(captured.shape, sampled / blocks, jnp.float32)
    for group, i in index.items():
        values |= {f"sampled/{group}/{slot}": i[..., slot] for slot in range(i.shape[-1])}
    return values


def _differing(places: list[Names]) -> list[Names]:
    """The places without the names that they all begin with, and without those that they all end with."""
    start = _shared(places)
    ends = [place[start:][::-1] for place in places]
    stop = _shared(ends)
    return [end[stop:][::-1] for end in ends]


def _shared(places: list[Names]) -> int:
    """How many names at the start are the same in all places."""
    columns = zip(*places, strict=False)
    return len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
