"""Scion: each kind of layer takes the steepest step in its own norm ball."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from .._core.checks import check_function, check_number
from .._linalg.normalizers import Normalizer, outputs_first, sign_lmo, spectral_lmo, unit_rows
from .._matrices.as_matrices import as_matrices
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._transforms.momentum import ema
from .._transforms.normalize import normalize, normalize_sequentially
from .matrix_optimizer import WeightDecay, at_least_float32, matrix_optimizer
from .others_by_kind import ByKind, others_by_kind


def scion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    radius: float = 50.0,
    edge_radius: float = 3000.0,
    lmo: Normalizer | None = None,
    embedding_lmo: Normalizer | None = None,
    head_lmo: Normalizer | None = None,
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scion: each kind of layer takes the steepest step in its own norm ball.

        D ← β D + (1 - β) G,   step = ρ lmo(D),   lmo(D) = argmax { <D, z> : |z| <= 1 }

        hidden matrices         spectral:   √(fan_out/fan_in) msign(D),   ρ = `radius`
        embeddings and heads    sign:       sign(D) / width,              ρ = `edge_radius`
        all other leaves        RMS:        D / rms(D) of the last axis,  ρ = `radius`

    `weight_decay=1` is the constrained form: weights that start in the ball of radius `ρ` stay there.
    State: a full-size momentum for every leaf, `m n` numbers per matrix, as in Muon.

    Args:
      learning_rate: a number or a schedule; 2⁻¹² in the authors' example, with these radii.
      momentum: `β = 1 - α`; α = 0.1 in the paper.
      radius, edge_radius: 50 and 3000 in the paper's language models.
      lmo: for hidden matrices, a function of `(*, fan_out, fan_in)`: `spectral_lmo` (the default, with
        Newton-Schulz), `sign_lmo`, `row_lmo` or `column_lmo`.
      embedding_lmo: for tables, a function of `(*, vocabulary, width)`: `sign_lmo` (the default; the paper
        has it for a table tied to the head) or `unit_rows` (the paper's ColNorm, for an untied table).
      head_lmo: for the kernels of heads, a function of `(*, vocabulary, width)`: `sign_lmo` (the default) or
        `row_lmo`.
      weight_decay, weight_decay_mask, weight_dimension_numbers: as in `muon`, for all leaves.
      others: the transformation for all leaves that are not matrices, in place of the last two lines.

    Raises:
      TypeError, ValueError: as for `muon`; also if a radius is below 0, an `lmo` is not a function, or a leaf
        is complex.

    Examples:
      >>> gradients = {"embedding": jnp.ones((16, 4)), "kernel": jnp.ones((4, 8))}
      >>> tx = gum_optax.scion(2**-12)
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> float(updates["embedding"][0, 0]) * 2**12  # the edge radius over the width
      -750.0

    References:
      Pethick et al., Scion, arXiv 2502.07529, Algorithms 1 and 2, Tables 2 to 4.
    """
    momentum = check_number("momentum", momentum, at_least=0, below=1)
    radius = check_number("radius", radius, at_least=0)
    edge_radius = check_number("edge_radius", edge_radius, at_least=0)
    hidden = check_function("lmo", spectral_lmo if lmo is None else lmo, "gum_optax.spectral_lmo")
    table = check_function(
        "embedding_lmo", sign_lmo if embedding_lmo is None else embedding_lmo, "gum_optax.sign_lmo"
    )
    head = check_function("head_lmo", sign_lmo if head_lmo is None else head_lmo, "gum_optax.sign_lmo")

    def others_rule(kinds):
        steepest = others_by_kind(
            kinds,
            tables=optax.chain(_of_matrices(table), optax.scale(edge_radius)),
            heads=lambda numbers: optax.chain(
                _of_matrices(outputs_first(head), numbers), optax.scale(edge_radius)
            ),
            vectors=optax.chain(normalize(_unit_vector), optax.scale(radius)),
        )
        return optax.chain(averaged, steepest)

    # The average is in float32 and has no bias correction, which would not change a normalized step.
    averaged = ema(momentum)
    rule = at_least_float32(optax.chain(averaged, normalize_sequentially(outputs_first(hidden))))
    return matrix_optimizer(
        rule,
        learning_rate,
        radius,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        others=others,
        others_rule=ByKind(others_rule),
        wide=False,
    )


def _of_matrices(method: Normalizer, numbers: WeightDimensionNumbers = None) -> optax.GradientTransformation:
    return as_matrices(normalize(method), numbers, wide=False)


def _unit_vector(x: Array) -> Array:
    """Scale `x` to RMS one along the last axis; an empty leaf has no RMS and stays empty."""
    return unit_rows(jnp.atleast_1d(x)).reshape(x.shape) if x.size else x
