"""What an optimizer state says of itself."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Scalar

from ._low_rank import LowRankState
from ._skipping import SkipNonFiniteState
from ._unbiased import SampledState

_STATES = (LowRankState, SkipNonFiniteState)


def states_of(tree: Any) -> list[Any]:
    """All of this library's states within an optimizer state, outermost first."""
    states = []
    for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, _STATES)):
        if isinstance(node, _STATES):
            states += [node, *(s for field in node for s in states_of(field))]
    return states


def metrics(state: Any) -> dict[str, Scalar | Array]:
    """What GUM did in the last step, read from an optimizer state of any nesting, at no cost.

    Returns:
      A flat dict of scalars, each present where the state has it:

      - `captured_energy`: `|PᵀG|² / |G|²` over the projected blocks;
      - `residual_share`: `|G - P PᵀG| / |G|`, its complement;
      - `refresh_count`: subspaces found so far, so periods begun;
      - `realised_fraction`: sampled blocks over the blocks of sampled groups, `γ/L`;
      - `sampled/64x256/0`: the block in that slot of that group, counted over the group's leaves;
      - `skipped_steps`: steps that some leaf has skipped, for a gradient that was not finite.
    """
    found: dict[str, Any] = {}
    for node in states_of(state):
        if isinstance(node, SkipNonFiniteState):
            found["skipped_steps"] = found.get("skipped_steps", 0) + node.skipped
        elif isinstance(node, LowRankState):
            if not jax.tree.leaves(node.projectors):
                continue  # nothing is projected, so nothing is lost
            found["captured_energy"] = node.captured
            found["residual_share"] = jnp.sqrt(jnp.clip(1 - node.captured, 0))
            found["refresh_count"] = node.refreshes
            if isinstance(node.outside, SampledState) and isinstance(node.outside.index, dict):
                index = node.outside.index
                blocks = sum(math.prod(p.shape[:-2]) for p in jax.tree.leaves(node.projectors))
                found["realised_fraction"] = jnp.float32(sum(i.shape[-1] for i in index.values()) / blocks)
                for group, i in index.items():
                    found |= {f"sampled/{group}/{slot}": i[..., slot] for slot in range(i.shape[-1])}
    return {name: jnp.asarray(value) for name, value in found.items()}  # NNX would give its variables
