"""More optimizers of the field in a subspace: what the residual does, and where the subspace comes from."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._carries import restart, rotate_first_moment
from ._checks import check_integer, check_number
from ._dimensions import WeightDimensionNumbers
from ._full_rank import adam_rule, chosen
from ._low_rank import low_rank
from ._normalize import normalize
from ._residuals import Residual, scale_as_inside
from ._routing import by_constant, matrices_and_others
from ._scaling import limit_norm_growth
from ._subspace import SubspaceFinder, random_subspace
from ._switch import switch_subspace, track_subspace


def golore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    *,
    random_after: int = 0,
    key: int | jax.Array = 0,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    find_subspace: SubspaceFinder | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GoLore: GaLore, and later a random subspace, in which noise cannot hide the signal.

        every K steps   P ← top r left singular vectors of G, or after `random_after` steps uniform;
                        M ← (P_newᵀ P_old) M        (Adam's mean; its squares stay)
        every step      R = PᵀG,   step = α P Adam(R)

    `E[P Pᵀ] = (r/m) I` for a uniform `P`: the projected gradient is unbiased up to that factor. Random
    from the start (`random_after=0`) is the subspace of FedSLoP and Flora. State: `m r + 2 r n` numbers.

    Args:
      learning_rate, rank, period, key, scale, b1, b2, eps: as in `galore`.
      random_after: steps before the subspace is random; the paper's experiments take 80 % of all.
      find_subspace: of the steps before; `track_subspace` (the default), `svd_subspace` (the paper's).
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as `galore`; also `random_after` below 0 or not an integer.

    References:
      He et al., GoLore, arXiv 2410.11289, Algorithm 2; FedSLoP, arXiv 2604.24012.
    """
    check_integer("random_after", random_after, at_least=0)
    rule = low_rank(
        adam_rule(b1, b2, eps),
        rank,
        period,
        find_subspace=switch_subspace(random_after, chosen(find_subspace, track_subspace), random_subspace),
        carry=rotate_first_moment,
        key=key,
    )
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(rule, learning_rate, by_constant(scale), *shared)


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    *,
    key: int | jax.Array = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    norm_growth: float = 1.01,
    find_subspace: SubspaceFinder | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore, and the residual with the scale that Adam gave its column inside the subspace.

        R = PᵀG,   S = Adam(R),   φⱼ = |S[:, j]| / |R[:, j]|
        step = P S + φ ∘ (G - P R),   the norm of the last term growing by at most 1.01 a step

    State: `m r + 2 r n` numbers a matrix, and one for the norm.

    Args:
      learning_rate: a number or a schedule. There is no `α` here: the authors' code has one inside the
        subspace, 0.25 in its C4 runs.
      rank, period, key, b1, b2, eps, find_subspace: as in `galore`.
      norm_growth: the limiter's ratio; 1.01 in the paper.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as `galore`; also `norm_growth` below 1.

    References:
      Chen et al., Fira, arXiv 2410.01623, Algorithm 1.
    """
    check_number("norm_growth", norm_growth, at_least=1)
    rule = low_rank(
        adam_rule(b1, b2, eps),
        rank,
        period,
        find_subspace=chosen(find_subspace, track_subspace),
        residual=optax.chain(scale_as_inside(), limit_norm_growth(norm_growth)),
        key=key,
    )
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(rule, learning_rate, by_constant(1.0), *shared)


def frugal(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    period: int = 200,
    *,
    key: int | jax.Array = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    find_subspace: SubspaceFinder | None = None,
    residual: Residual | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """FRUGAL: Adam in a subspace, and a rule without state outside it.

        every K steps   P ← top r left singular vectors of G;   Adam starts again
        every step      R = PᵀG,   step = P Adam(R) + sign(G - P R)

    State: `m r + 2 r n` numbers a matrix.

    Args:
      learning_rate: a number or a schedule, of both parts; about AdamW's.
      rank, period, key, b1, b2, eps, find_subspace: as in `galore`.
      residual: the rule outside; default the sign. Orthogonalized at the same size:
        `normalize(multi_norm((newton_schulz, unit_frobenius)))`.
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as `galore_muon`; also `b1` or `b2` outside `[0, 1)`, `eps` below 0.

    References:
      Zmushko et al., FRUGAL, arXiv 2411.07837, Algorithm 1.
    """
    rule = low_rank(
        adam_rule(b1, b2, eps),
        rank,
        period,
        find_subspace=chosen(find_subspace, track_subspace),
        carry=restart,
        residual=chosen(residual, normalize(jnp.sign)),
        key=key,
    )
    shared = (weight_decay, weight_decay_mask, weight_dimension_numbers, others)
    return matrices_and_others(rule, learning_rate, by_constant(1.0), *shared)
