"""MaxText takes an optimizer by name and knows only its own: `install` gives it another."""

from collections.abc import Callable
from typing import Any

import optax

# What MaxText's own `get_optimizer` wraps around its optimizers, and this one does not.
_WRAPPERS = ("skip_step_on_spikes", "trainable_parameters_mask")


def install(optimizer: Callable[..., optax.GradientTransformation], **arguments: Any) -> None:
    """Make MaxText train with `optimizer(learning_rate, **arguments)`, whatever `opt_type` says.

    Call it before MaxText's `train.main`. The learning rate is MaxText's schedule; weight decay is
    `adam_weight_decay` under `adamw_mask`, unless `arguments` say otherwise. The matrices are read from the
    names of the variables' axes, which also say where a scan puts the layers.

    Args:
      optimizer: one of this library, `gum_optax.gum` for instance, or a function with their arguments.
      **arguments: its other arguments, such as `rank=128`.

    Raises:
      ValueError: when training begins, if the configuration asks for `skip_step_on_spikes` or
        `trainable_parameters_mask`, which only MaxText's own optimizers do.
    """
    from maxtext.optimizers import optimizers  # here: what it imports depends on the environment's variables

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
        return optimizer(learning_rate_schedule, **{**decay, **arguments})

    optimizers.get_optimizer = get_optimizer
