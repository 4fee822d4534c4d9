"""How much of the gradient the subspace captures."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.turns import Turn, WholeStep
from .._linalg.numerics import safe_reciprocal


class Energy(NamedTuple):
    """`|PᵀG|²` and `|G|²` of a leaf, over the square of its largest coordinate: safe from 1e-30 to 1e30."""

    scale: Float[Array, ""]
    inside: Float[Array, ""]
    whole: Float[Array, ""]


def squares(x: Float[Array, "..."], scale: Float[Array, ""]) -> Float[Array, ""]:
    """`|x|²` over the square of a scale."""
    return jnp.sum(jnp.square(x * safe_reciprocal(scale)), dtype=jnp.float32)


def captured_share(energies: Sequence[Energy], turn: WholeStep, are_live: Sequence[bool]) -> Float[Array, ""]:
    """`Σ|PᵀG|² / Σ|G|²` over the leaves of all turns so far; zero if all gradients are zero."""
    if isinstance(turn, Turn):
        live = [energy for energy, yes in zip(energies, are_live, strict=True) if yes]
        nothing = Energy(*(jnp.zeros((), jnp.float32) for _ in Energy._fields))
        energies = [turn.accumulate(nothing, lambda before: _sum_of([before, *live]))]
    if not energies:
        return jnp.zeros((), jnp.float32)
    total = _sum_of(energies)
    return total.inside * safe_reciprocal(total.whole)


def _sum_of(energies: Sequence[Energy]) -> Energy:
    scale, inside, whole = (jnp.stack(x) for x in zip(*energies, strict=True))
    share = jnp.square(scale * safe_reciprocal(scale.max()))
    return Energy(scale.max(), share @ inside, share @ whole)
