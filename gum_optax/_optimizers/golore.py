"""GoLore: GaLore at first, later in a random subspace."""

from typing import Any

import jax
import optax

from .._core.checks import check_integer, check_number
from .._lowrank.finders import SubspaceFinder, random_subspace
from .._lowrank.low_rank import low_rank
from .._lowrank.on_refresh import rotate_first_moment
from .._lowrank.switch import switch_subspace, track_subspace
from .._matrices.dimension_numbers import WeightDimensionNumbers
from .._transforms.momentum import scale_by_clipped_adam
from .matrix_optimizer import WeightDecay, matrix_optimizer


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
    weight_decay: WeightDecay = 0.0,
    weight_decay_mask: Any = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GoLore: GaLore at first, later in a random subspace, where noise cannot hide the signal.

        every K steps   P ← top r left singular vectors of G, or uniform after `random_after` steps;
                        M ← (P_newᵀ P_old) M        (Adam's mean; its squares stay)
        every step      R = PᵀG,   step = α P Adam(R)

    `E[P Pᵀ] = (r/m) I` for a uniform `P`: the projected gradient is unbiased up to that factor. A subspace
    that is random from the start (`random_after=0`) is that of FedSLoP and Flora. State: `m r + 2 r n`
    numbers per matrix.

    Args:
      learning_rate, rank, period, key, scale, b1, b2, eps: as in `galore`.
      random_after: the number of steps before the subspace becomes random; 80 % of all steps in the paper's
        experiments.
      find_subspace: the finder for the first steps: `track_subspace` (the default) or `svd_subspace` (as in
        the paper).
      weight_decay, weight_decay_mask, weight_dimension_numbers, others: as in `muon`.

    Raises:
      TypeError, ValueError: as for `galore`; also if `random_after` is below 0 or not an integer.

    Examples:
      >>> gradients = {"kernel": jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(8))}  # of rank 1
      >>> tx = gum_optax.golore(1e-2, rank=1, random_after=0)
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> bool(gum_optax.metrics(state)["captured_energy"] < 0.9)  # a random subspace misses much of it
      True

    References:
      He et al., GoLore, arXiv 2410.11289, Algorithm 2; FedSLoP, arXiv 2604.24012.
    """
    check_integer("random_after", random_after, at_least=0)
    rule = low_rank(
        scale_by_clipped_adam(b1, b2, eps),
        rank,
        period,
        find_subspace=switch_subspace(
            random_after, track_subspace if find_subspace is None else find_subspace, random_subspace
        ),
        on_refresh=rotate_first_moment,
        key=key,
    )
    return matrix_optimizer(
        rule,
        learning_rate,
        check_number("scale", scale, at_least=0),
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_dimension_numbers=weight_dimension_numbers,
        others=others,
    )
