"""Optimizers without a subspace: Muon, and those that keep nothing for a matrix.

A choice is a function, but its default is `None`: `optax.inject_hyperparams` takes every function among
the arguments, defaults too, for a schedule.
"""

import functools
from typing import Any

import optax

from ._checks import check_adam, check_function, check_integer
from ._dimensions import WeightDimensionNumbers
from ._momentum import adam, heavy_ball
from ._normalize import (
    multi_norm,
    normalize,
    normalize_in_turn,
    outputs_first,
    sinkhorn,
    standardize_rows,
    whiten,
)
from ._norms import LARGEST
from ._orthogonalize import POLAR_EXPRESS, Orthogonalizer, fastest_newton_schulz, newton_schulz, orthogonalize
from ._routing import by_constant, by_shape, matrices_and_others


def chosen(choice: Any, default: Any) -> Any:
    """An argument, or what it stands for when it is left out."""
    return default if choice is None else choice


def muon_rule(
    momentum: Any,
    orthogonalizer: Orthogonalizer | None,
    nesterov: bool = False,
    *,
    dtype: Any = None,
    together: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Muon's rule: `R ← β R + G,  step = NS(R)`, the heavy ball kept in `dtype`."""
    method = check_function(
        "orthogonalizer", chosen(orthogonalizer, fastest_newton_schulz), "gum_optax.polar"
    )
    return optax.chain(heavy_ball(momentum, nesterov, dtype), orthogonalize(method, together=together))


def adam_rule(b1: Any, b2: Any, eps: Any) -> optax.GradientTransformationExtraArgs:
    """Adam's rule, of gradients up to 1e15: an infinite square would stop it for good."""
    return optax.chain(optax.clip(LARGEST), adam(*check_adam(b1, b2, eps)))


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    nesterov: bool = False,
    momentum_dtype: Any = None,
    orthogonalizer: Orthogonalizer | None = None,
    consistent_rms: float | None = 0.2,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon: momentum, orthogonalized.

        R ← β R + G,   step = NS(R)   (with `nesterov`: NS(G + β R))

    State: one full-size momentum a matrix, `m n` numbers.

    Args:
      learning_rate: a number or a schedule; about AdamW's with `consistent_rms`.
      momentum: `β` in `[0, 1)`; 0.95 as in Jordan's.
      nesterov: look ahead, as Jordan's code does.
      momentum_dtype: what `R` is kept in: float32 (the default), or bfloat16, rounded to stochastically,
        which halves the state. (GUM's sampled blocks live outside the subspace; rounding puts a little of
        their momentum inside, where Newton-Schulz raises it.)
      orthogonalizer: `fastest_newton_schulz` (the default), `polar`, or any function
        `(*, m, n) -> (*, m, n)`.
      consistent_rms: step times `0.2 √max(fan_in, fan_out)` (Moonlight); `None`: times
        `√max(1, fan_out/fan_in)` (Jordan).
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in all optimizers of this
        library: decoupled decay, its mask, which leaves are matrices along which axes (default:
        `hidden_matrices`), and the rule of all other leaves (default: AdamW at `learning_rate`).

    Raises:
      TypeError, ValueError: an argument out of range or of the wrong type; at `init`, dimension
        numbers that do not fit a leaf, or a complex or integer matrix.

    References:
      Jordan et al., https://kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982.
    """
    rule = muon_rule(momentum, orthogonalizer, nesterov, dtype=momentum_dtype)
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(rule, learning_rate, by_shape(consistent_rms), *shared)


def swan(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: float = 0.05,
    orthogonalizer: Orthogonalizer | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SWAN: standardized rows, then whitening. No state for a matrix.

        G̃ = rows of G, each minus its mean, over its deviation;   O = msign(G̃);   step = α O |G̃|_F / |O|_F

    Args:
      learning_rate: a number or a schedule; 0.02 in the paper.
      scale: `α`; 0.05 in the paper.
      orthogonalizer: for `msign`; default Newton-Schulz with `POLAR_EXPRESS` (the paper's own iteration
        stands on an unstable fixed point). `polar` is exact.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as `muon`; also `scale` below 0.

    References:
      Ma et al., SWAN, arXiv 2412.13148, Algorithm 1.
    """
    express = functools.partial(newton_schulz, coefficients=POLAR_EXPRESS)
    method = check_function("orthogonalizer", chosen(orthogonalizer, express), "gum_optax.polar")
    normalizer = multi_norm((standardize_rows, functools.partial(whiten, method=method)))
    rule = normalize_in_turn(outputs_first(normalizer))
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(rule, learning_rate, by_constant(scale), *shared, wide=False)


def sinkgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: float = 0.05,
    rounds: int = 5,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SinkGD: rows and columns of the gradient to constant norms, in turn. No state for a matrix.

        repeat `rounds` times:   rows to ℓ2-norm √n, then columns to √m;   step = α X

    Args:
      learning_rate: a number or a schedule; 0.02 in the paper.
      scale: `α`; 0.05 in the paper.
      rounds: 5 in the paper.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as `muon`; also `scale` below 0, `rounds` below 1.

    References:
      Scetbon et al., SinkGD, arXiv 2502.06742, Algorithm 4.
    """
    check_integer("rounds", rounds, at_least=1)
    # A Flax kernel has the outputs as columns, the paper's matrices as rows.
    rule = normalize(functools.partial(sinkhorn, rounds=rounds, first=-2))
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(rule, learning_rate, by_constant(scale), *shared, wide=False)
