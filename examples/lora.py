"""LoRA beside the optimizers: adapters for the kernels of a `Llama`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from llama import Llama, Size
from optimizers import Maker, Settings, optimizer

# The kernels of a layer that get adapters.
KERNELS = ("query", "key", "value", "out", "gate", "up", "down")

# LoRA (Hu et al., arXiv 2106.09685): AdamW for the factors of each kernel's change.
LORA: tuple[Maker, float] = (
    lambda s, lr, others, weight_decay: optax.adamw(lr, weight_decay=weight_decay),
    1e-3,
)


def add_adapters(model: Llama, rank: int, first: int, rngs: nnx.Rngs) -> None:
    """Give every kernel from layer `first` on a change `A B` of a rank, which is zero at first."""
    for block in list(model.layers)[first:]:
        for name in KERNELS:
            linear = getattr(block, name)
            fans = linear.in_features, rank, linear.out_features
            setattr(block, name, nnx.LoRA(*fans, base_module=linear, dtype=linear.dtype, rngs=rngs))


def merge_adapters(model: Llama) -> None:
    """Add the changes to the kernels."""
    for block in model.layers:
        for name in KERNELS:
            if isinstance(found := getattr(block, name), nnx.LoRA):
                linear: Any = found.base_module
                kernel = linear.kernel.get_value()
                change = found.lora_a.get_value() @ found.lora_b.get_value()
                linear.kernel.set_value(kernel + change.astype(kernel.dtype))
                setattr(block, name, linear)


def matching_rank(settings: Settings, size: Size, layers: int) -> int:
    """The rank at which AdamW's state of the adapters is GUM's for the kernels of the last `layers`."""
    chosen = dataclasses.replace(settings, optimizer="gum", clip=0.0, others="frozen")
    model = nnx.eval_shape(lambda: Llama(size, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    last = [nnx.split(layer, nnx.Param)[1] for layer in list(model.layers)[-layers:]]
    kernels = {f"layer{i}": {k: layer[k]["kernel"] for k in KERNELS} for i, layer in enumerate(last)}
    state = jax.eval_shape(optimizer(chosen).init, kernels)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    # Two float32 moments for each number of the factors.
    return max(1, round(held / (8 * sum(sum(x.shape) for x in jax.tree.leaves(kernels)))))
