"""Optimizers of the field that keep a momentum of full size."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ._checks import check_function, check_number
from ._cosmos import cosmos_rule
from ._dimensions import WeightDimensionNumbers, names_of
from ._feedback import dion_rule, trion_rule
from ._full_rank import chosen
from ._hidden import policy
from ._matrices import as_matrices
from ._momentum import average
from ._normalize import (
    Normalizer,
    normalize,
    normalize_in_turn,
    outputs_first,
    sign_lmo,
    spectral_lmo,
    unit_rows,
)
from ._orthogonalize import Orthogonalizer, newton_schulz
from ._routing import at_least_float32, by_constant, by_fan_ratio, by_shape, matrices_and_others, partitioned


def trion(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    momentum: float = 0.95,
    orthogonalizer: Orthogonalizer | None = None,
    consistent_rms: float | None = 0.2,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trion: Muon in the strongest cosines of the momentum, with error feedback.

        M ← M + G,   P = the r columns of the DCT with the largest |PᵀM|₁,   R = PᵀM
        M ← M - (1 - μ) P R,   step = P NS(R)

    Needs a full-size momentum: `m n` numbers a matrix, as Muon. What is small is the orthogonalization.

    Args:
      learning_rate: a number or a schedule.
      rank: `r`, cosines kept; at most `m` are.
      momentum: `μ`, what stays of the directions stepped in.
      orthogonalizer, consistent_rms, weight_decay, weight_decay_mask, weight_dimension_numbers, others: as
        in `muon`.

    Raises:
      TypeError, ValueError: as `muon`; also `rank` below 1 or not an integer.

    References:
      Modoranu et al., arXiv 2505.17967, Algorithm 2.
    """
    rule = trion_rule(rank, momentum, chosen(orthogonalizer, newton_schulz))
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(rule, learning_rate, by_shape(consistent_rms), *shared)


def dion(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    key: int | jax.Array = 0,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Dion: one power iteration of the momentum a step, orthonormalized, with error feedback.

        M ← M + G,   P = orth(M Q),   R = MᵀP,   M ← M - (1 - μ) P Rᵀ
        Q ← R, its columns to norm one,   step = √(fan_out/fan_in) P Qᵀ

    Needs a full-size momentum: `m n + n r` numbers a matrix, more than Muon.

    Args:
      learning_rate: a number or a schedule; 0.01 in the paper.
      rank: `r`; at most `m`.
      key: an integer seed or a JAX key, of the first `Q`.
      momentum: `μ`, what stays of the directions stepped in.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as `muon`; also `rank` below 1 or not an integer.

    References:
      Ahn et al., Dion, arXiv 2504.05295, Algorithm 1.
    """
    rule = dion_rule(rank, momentum, key)
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(rule, learning_rate, by_fan_ratio, *shared)


def cosmos(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 64,
    *,
    key: int | jax.Array = 0,
    ratio: float = 0.2,
    b1: float = 0.9,
    b2: float = 0.96,
    eps: float = 1e-8,
    orthogonalizer: Orthogonalizer | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """COSMOS: Adam in the leading eigenspace of the gradient, Muon outside it.

        U ← orth(β₂ U S + (1 - β₂) G GᵀU),   A = U Adam(UᵀG),   B = NS(M - U UᵀM)
        step = γ norm(A + γ norm(B)),   norm to element RMS one

    Needs a full-size momentum: `m n + r (m + n) + r²` numbers a matrix, more than Muon. The whole
    update is in `cosmos_rule`.

    Args:
      learning_rate: a number or a schedule; about AdamW's.
      rank: `r`; 64 in the paper; at most `m`.
      key: an integer seed or a JAX key, of the first `U`.
      ratio: `γ`, the weight of the part outside, and the size of the step; 0.2 in the paper.
      b1, b2, eps: `β₁` of the momentum, `β₂` of the second moments, Adam's `ε`; 0.9 and 0.96 as in the
        authors' code.
      orthogonalizer, weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as `muon`; also `rank` below 1 or not an integer.

    References:
      Liu et al., COSMOS, arXiv 2502.17410, Algorithm 1.
    """
    rule = cosmos_rule(rank, ratio, b1, b2, eps, chosen(orthogonalizer, newton_schulz), key)
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(rule, learning_rate, by_constant(ratio), *shared)


def scion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    radius: float = 50.0,
    edge_radius: float = 3000.0,
    lmo: Normalizer | None = None,
    embedding_lmo: Normalizer | None = None,
    head_lmo: Normalizer | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scion: for each kind of layer the steepest step in a norm ball of its own.

        D ← β D + (1 - β) G,   step = ρ lmo(D),   lmo(D) = argmax { <D, z> : |z| <= 1 }

        hidden matrices         spectral:   √(fan_out/fan_in) msign(D),   ρ = `radius`
        embeddings and heads    sign:       sign(D) / width,              ρ = `edge_radius`
        all other leaves        RMS:        D / rms(D) of the last axis,  ρ = `radius`

    `weight_decay=1` is the constrained form: weights that start in the ball of radius `ρ` stay there.
    Needs a full-size momentum for every leaf: `m n` numbers a matrix, as Muon.

    Args:
      learning_rate: a number or a schedule; 2⁻¹² in the authors' example, with these radii.
      momentum: `β = 1 - α`; α = 0.1 in the paper.
      radius, edge_radius: 50 and 3000 in the paper's language models.
      lmo: of hidden matrices, a function of `(*, fan_out, fan_in)`: `spectral_lmo` (the default, with
        Newton-Schulz), `sign_lmo`, `row_lmo`, `column_lmo`.
      embedding_lmo: of tables, a function of `(*, vocabulary, width)`: `sign_lmo` (the default, the paper's
        for one that is tied to the head), or `unit_rows` where it is not (the paper's ColNorm).
      head_lmo: of the kernels of heads, a function of `(*, vocabulary, width)`: `sign_lmo` (the default),
        or `row_lmo`.
      weight_decay, weight_decay_mask, weight_dimension_numbers: as in `muon`, for all leaves.
      others: the transformation of all leaves that are not matrices, in place of the last two lines.

    Raises:
      TypeError, ValueError: as `muon`; also a radius below 0, an `lmo` that is not a function, or a complex
        leaf.

    References:
      Pethick et al., Scion, arXiv 2502.07529, Algorithms 1 and 2, Tables 2 to 4.
    """
    momentum = check_number("momentum", momentum, at_least=0, below=1)
    radius = check_number("radius", radius, at_least=0)
    edge_radius = check_number("edge_radius", edge_radius, at_least=0)
    hidden = check_function("lmo", chosen(lmo, spectral_lmo), "gum_optax.spectral_lmo")
    table = check_function("embedding_lmo", chosen(embedding_lmo, sign_lmo), "gum_optax.sign_lmo")
    head = check_function("head_lmo", chosen(head_lmo, sign_lmo), "gum_optax.sign_lmo")
    steepest: dict[str, optax.GradientTransformation] = {
        "tables": optax.chain(_of_matrices(table), optax.scale(edge_radius)),
        "heads": optax.chain(_of_matrices(outputs_first(head)), optax.scale(edge_radius)),
        "vectors": optax.chain(normalize(_unit_vector), optax.scale(radius)),
    }
    # In float32 and without bias correction, which no norm ball would see.
    averaged = average(momentum)
    rule = at_least_float32(optax.chain(averaged, normalize_in_turn(outputs_first(hidden))))
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(
        rule,
        learning_rate,
        by_constant(radius),
        *shared,
        others_rule=optax.chain(averaged, partitioned(steepest, _kinds)),
        wide=False,
    )


def _kinds(params: Any) -> list[str]:
    """The name of each leaf's ball, of the leaves that are not hidden matrices."""

    def kind(path, x, reading):
        if jnp.iscomplexobj(x):
            raise TypeError(
                f"leaf {jax.tree_util.keystr(path)} is complex, and scion's norm balls are of real numbers;"
                " pass others=optax.adamw(learning_rate), for instance."
            )
        if jnp.ndim(x) < 2 or (reading.entry is None and reading.kind not in ("embedding", "head")):
            return "vectors"
        is_table = reading.kind == "embedding" and names_of(path)[-1] != "kernel"
        return "tables" if is_table else "heads"

    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [kind(*leaf, reading) for leaf, reading in zip(leaves, policy(params), strict=True)]


def _of_matrices(method: Normalizer) -> optax.GradientTransformation:
    return as_matrices(normalize(method), wide=False)


def _unit_vector(x: Array) -> Array:
    """To RMS one along the last axis; an empty leaf has none."""
    return unit_rows(jnp.atleast_1d(x)).reshape(x.shape) if x.size else x
