"""AdamW with moments of eight bits, for embedding and head."""

from typing import Any

import optax

from .._transforms.adam_8bit import scale_by_adam_8bit
from .matrix_optimizer import WeightDecay, checked_decay, decayed_weights


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: WeightDecay = 1e-4,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw` with moments of eight bits: a quarter of the state.

        W ← W - η (Adam(G) + λ W)

    It is for the leaves that are not hidden matrices, whose moments are most of what is left of a state.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps: as in `scale_by_adam_8bit`.
      weight_decay, weight_decay_mask: as in `muon`; the default is `optax.adamw`'s.

    Returns:
      A transformation over trees of any shapes. State: 2.06 bytes a number of each leaf with 4096 numbers or
      more.

    Raises:
      TypeError, ValueError: an argument is out of range or of the wrong type.

    Examples:
      >>> params = {"embedding": jnp.ones((64, 128)), "kernel": jnp.ones((64, 128))}
      >>> others = gum_optax.adamw_8bit(3e-4, weight_decay=0.1)
      >>> tx = gum_optax.gum(1e-3, momentum_dtype="int8", others=others)
      >>> gum_optax.memory_report(tx, params).leaves[0].state  # of the embedding, in bytes
      {'mu': 8192, 'nu': 8192, 'mu_scales': 256, 'nu_scales': 256}
    """
    return optax.chain(
        scale_by_adam_8bit(b1, b2, eps),
        decayed_weights(checked_decay(weight_decay), weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
