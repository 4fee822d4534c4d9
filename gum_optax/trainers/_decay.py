"""The weight decay and the mask of a trainer, as arguments of an optimizer."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import optax


def decay_arguments(
    optimizer: Callable[..., optax.GradientTransformation], weight_decay: Any, mask: Any, remedy: str
) -> dict[str, Any]:
    """The arguments of the decay; the mask only for an optimizer that takes one, unlike `adalomo`.

    Args:
      optimizer: the function that gets the arguments.
      weight_decay: the decay of the trainer.
      mask: the trainer's tree of booleans, a function to one, or `None`.
      remedy: what the user of this trainer can do about a mask, for the error.

    Raises:
      ValueError: there are a decay and a mask, and the optimizer takes no mask.
    """
    parameters = inspect.signature(optimizer).parameters.values()
    if any(p.name == "weight_decay_mask" or p.kind is p.VAR_KEYWORD for p in parameters):
        return {"weight_decay": weight_decay, "weight_decay_mask": mask}
    # A mask of no decay decides nothing.
    if mask is not None and not (isinstance(weight_decay, int | float) and weight_decay == 0):
        function = optimizer.func if isinstance(optimizer, functools.partial) else optimizer
        name = getattr(function, "__name__", function)
        raise ValueError(
            f"{name} decays all leaves by weight_decay={weight_decay!r} and takes no weight_decay_mask:"
            f" {remedy}."
        )
    return {"weight_decay": weight_decay}
