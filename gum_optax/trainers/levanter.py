"""The optimizers as Levanter's configurations: `optimizer: {type: gum, rank: 128}`.

Each has a field for every number in its optimizer's signature, beside those that all of Levanter's optimizers
have (`learning_rate`, `weight_decay`, `warmup`, `lr_schedule`, ...). Importing this module registers them.
Haliax's layers say which axes of a weight are its fan-in and fan-out.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax
from levanter.optim.config import OptimizerConfig

import gum_optax

# The arguments that a configuration can hold, by their annotations; functions and trees are not among them.
_FIELD_TYPES: dict[Any, Any] = {kind: kind for kind in (int, float, bool, float | None)} | {
    int | jax.Array: int
}


def config_of(
    optimizer: Callable[..., optax.GradientTransformation], type_name: str | None = None
) -> type[OptimizerConfig]:
    """The configuration of an optimizer, registered under its name or `type_name`.

    Its fields are the optimizer's numeric arguments and `momentum_dtype`, with their defaults; `key` is an
    integer. `max_grad_norm` clips the gradient first, as in Levanter's configurations; `null` does not.

    Args:
      optimizer: one of this library, or a function with their arguments and annotations.
      type_name: what a configuration calls it under `type`; default, the function's name.

    Raises:
      ValueError: Levanter has another optimizer of that name.
    """
    parameters = inspect.signature(optimizer).parameters.values()
    kinds = {p.name: _FIELD_TYPES.get(p.annotation) for p in parameters} | {"momentum_dtype": str | None}
    # Levanter's own fields give the learning rate and the weight decay.
    own = [p for p in parameters if kinds[p.name] is not None and p.name != "weight_decay"]

    def build(self, num_train_steps):
        tx = optimizer(
            self.lr_scheduler(num_train_steps),
            **{p.name: getattr(self, p.name) for p in own},
            weight_decay=self.weight_decay,
            weight_decay_mask=self.build_weight_decay_mask(),
        )
        if self.max_grad_norm is None:
            return tx
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), tx)

    fields = [(p.name, kinds[p.name], dataclasses.field(default=p.default)) for p in own]
    fields.append(("max_grad_norm", float | None, dataclasses.field(default=1.0)))
    name = optimizer.__name__
    described = {"build": build, "__doc__": f"The arguments of `gum_optax.{name}`.", "__module__": __name__}
    class_name = "".join(word.capitalize() for word in name.split("_")) + "Config"
    config = dataclasses.make_dataclass(
        class_name, fields, bases=(OptimizerConfig,), namespace=described, frozen=True
    )
    return OptimizerConfig.register_subclass(type_name or name, config)


GumConfig = config_of(gum_optax.gum)
GaloreConfig = config_of(gum_optax.galore)
GaloreMuonConfig = config_of(gum_optax.galore_muon)
SumoConfig = config_of(gum_optax.sumo)
GoloreConfig = config_of(gum_optax.golore)
FiraConfig = config_of(gum_optax.fira)
FrugalConfig = config_of(gum_optax.frugal)
SwanConfig = config_of(gum_optax.swan)
SinkgdConfig = config_of(gum_optax.sinkgd)
TrionConfig = config_of(gum_optax.trion)
DionConfig = config_of(gum_optax.dion)
CosmosConfig = config_of(gum_optax.cosmos)
# Levanter has optimizers of these names.
MuonConfig = config_of(gum_optax.muon, "gum_optax_muon")
ScionConfig = config_of(gum_optax.scion, "gum_optax_scion")
