"""Lets MaxText, which selects among its own optimizers by name, train with any optimizer: `install`."""

from collections.abc import Callable
from typing import Any

import optax

from ._decay import decay_arguments

# MaxText's own `get_optimizer` wraps these around its optimizers; `install` does not.
_WRAPPERS = ("skip_step_on_spikes", "trainable_parameters_mask")
_WITHOUT_A_MASK = "leave adamw_mask out, or set adam_weight_decay to 0"


def install(optimizer: Callable[..., optax.GradientTransformation], **arguments: Any) -> None:
    """Make MaxText train with `optimizer(learning_rate, **arguments)`, whatever `opt_type` says.

    Call it before MaxText's `train.main`. The learning rate is MaxText's schedule, and weight decay is
    `adam_weight_decay` under `adamw_mask`, unless `arguments` override them. The axis names of the variables
    tell which leaves are matrices and on which axis a scan puts the layers.

    Args:
      optimizer: an optimizer of this library, such as `gum_optax.gum`, or a function with the same arguments.
      **arguments: the other arguments of `optimizer`, such as `rank=128`.

    Raises:
      ValueError: when training begins, if the configuration requests `skip_step_on_spikes` or
        `trainable_parameters_mask`, which only MaxText's own optimizers support; or if it has a decay and an
        `adamw_mask`, and the optimizer takes no mask, as `adalomo`.
    """
    from maxtext.optimizers import optimizers  # here, because its imports depend on environment variables

    def get_optimizer(config, learning_rate_schedule, model=None, mesh=None):
        del model, mesh
        for name in _WRAPPERS:
            if getattr(config, name, None):
                raise ValueError(
                    f"gum_optax.trainers.maxtext does not support {name}={getattr(config, name)!r};"
                    " turn it off, or wrap the optimizer that you pass to install."
                )
        decay = {
            "weight_decay": config.adam_weight_decay,
            "weight_decay_mask": optimizers.get_adamw_mask(config),
        }
        own = {**decay, **arguments}
        weight_decay, mask = own.pop("weight_decay"), own.pop("weight_decay_mask")
        own |= decay_arguments(optimizer, weight_decay, mask, _WITHOUT_A_MASK)
        return optimizer(learning_rate_schedule, **own)

    optimizers.get_optimizer = get_optimizer
