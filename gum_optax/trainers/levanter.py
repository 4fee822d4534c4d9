"""The optimizers as Levanter's configurations: `optimizer: {type: gum, rank: 128}`.

Each configuration has a field for every numeric argument of its optimizer, beside the fields of all Levanter
optimizers (`learning_rate`, `weight_decay`, `warmup`, `lr_schedule`, ...). Importing this module registers
the configurations. Haliax's layers tell which axes of a weight are its fan-in and fan-out.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax
from levanter.optim.config import OptimizerConfig

import gum_optax

from ._decay import decay_arguments

# The field types of a configuration, by the annotations of arguments; it cannot hold functions and trees.
_FIELD_TYPES: dict[Any, Any] = {annotation: annotation for annotation in (int, float, bool, float | None)} | {
    int | jax.Array: int
}
_WITHOUT_A_MASK = "set weight_decay to 0, or default_weight_decay_mask to false and no weight_decay_modules"


def config_of(
    optimizer: Callable[..., optax.GradientTransformation],
    type_name: str | None = None,
    *,
    max_grad_norm: float | None = 1.0,
) -> type[Any]:
    """Make the configuration of an optimizer, and register it under the optimizer's name or `type_name`.

    The fields are the optimizer's numeric arguments and `momentum_dtype`, with their defaults; `key` is an
    integer. `max_grad_norm` first clips the gradient, as in Levanter's configurations; `null` turns clipping
    off. Levanter's decay and its mask go to the optimizer; to build an optimizer that takes no mask, such as
    `adalomo`, is a ValueError where there are both.

    Args:
      optimizer: an optimizer of this library, or a function with the same arguments and annotations.
      type_name: the name of the optimizer under `type` in a configuration. Default: the function's name.
      max_grad_norm: the default of that field.

    Returns:
      A subclass of Levanter's `OptimizerConfig`.

    Raises:
      ValueError: Levanter has another optimizer of that name.
    """
    parameters = inspect.signature(optimizer).parameters.values()
    types = {p.name: _FIELD_TYPES.get(p.annotation) for p in parameters} | {"momentum_dtype": str | None}
    # Levanter's own fields hold the learning rate and the weight decay.
    own = [p for p in parameters if types[p.name] is not None and p.name != "weight_decay"]

    def build(self, num_train_steps):
        tx = optimizer(
            self.lr_scheduler(num_train_steps),
            **{p.name: getattr(self, p.name) for p in own},
            **decay_arguments(optimizer, self.weight_decay, self.build_weight_decay_mask(), _WITHOUT_A_MASK),
        )
        if self.max_grad_norm is None:
            return tx
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), tx)

    fields = [(p.name, types[p.name], dataclasses.field(default=p.default)) for p in own]
    fields.append(("max_grad_norm", float | None, dataclasses.field(default=max_grad_norm)))
    name = optimizer.__name__
    described = {"build": build, "__doc__": f"The arguments of `gum_optax.{name}`.", "__module__": __name__}
    class_name = "".join(word.capitalize() for word in name.split("_")) + "Config"
    config = dataclasses.make_dataclass(
        class_name, fields, bases=(OptimizerConfig,), namespace=described, frozen=True
    )
    return OptimizerConfig.register_subclass(type_name or name, config)


GumConfig: type[Any] = config_of(gum_optax.gum)
GaloreConfig: type[Any] = config_of(gum_optax.galore)
GaloreMuonConfig: type[Any] = config_of(gum_optax.galore_muon)
SumoConfig: type[Any] = config_of(gum_optax.sumo)
GoloreConfig: type[Any] = config_of(gum_optax.golore)
FiraConfig: type[Any] = config_of(gum_optax.fira)
FrugalConfig: type[Any] = config_of(gum_optax.frugal)
SwanConfig: type[Any] = config_of(gum_optax.swan)
SinkgdConfig: type[Any] = config_of(gum_optax.sinkgd)
TrionConfig: type[Any] = config_of(gum_optax.trion)
DionConfig: type[Any] = config_of(gum_optax.dion)
CosmosConfig: type[Any] = config_of(gum_optax.cosmos)
NormuonConfig: type[Any] = config_of(gum_optax.normuon)
HfacConfig: type[Any] = config_of(gum_optax.hfac)
# Its step has a size of its own, whatever that of the gradient.
AdalomoConfig: type[Any] = config_of(gum_optax.adalomo, max_grad_norm=None)
Adamw8bitConfig: type[Any] = config_of(gum_optax.adamw_8bit)
# Levanter has its own optimizers with these two names.
MuonConfig: type[Any] = config_of(gum_optax.muon, "gum_optax_muon")
ScionConfig: type[Any] = config_of(gum_optax.scion, "gum_optax_scion")
