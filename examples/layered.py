"""A `Llama` as `gum_optax.layerwise_update` takes it."""

from typing import Any

import jax
from flax import nnx

from llama import Llama
from losses import Batch, mean_cross_entropy


class Layered:
    """The embedding of a model, one of its layers, which are all alike, and its head."""

    def __init__(self, model: Llama):
        self.tied = not hasattr(model, "lm_head")
        self.scale = model.embedding_scale
        self.ends = ("norm",) if self.tied else ("norm", "lm_head")
        parts = {"embed": model.embed, "layer": model.layers[0]}
        parts |= {name: getattr(model, name) for name in self.ends}
        self.graphs = {name: nnx.split(part, nnx.Param)[0] for name, part in parts.items()}

    def divide(self, params: Any) -> dict[str, Any]:
        """The parameters of the model, divided."""
        head = {name: params[name] for name in self.ends}
        return {"embed": params["embed"], "layers": params["layers"], "head": head}

    @staticmethod
    def whole(divided: dict[str, Any]) -> nnx.State:
        """The parameters as the model has them."""
        return nnx.State({"embed": divided["embed"], "layers": divided["layers"], **divided["head"]})

    def embed(self, own: Any, batch: Batch) -> jax.Array:
        x = nnx.merge(self.graphs["embed"], own)(batch.tokens)
        return x if self.scale == 1 else x * self.scale

    def layer(self, own: Any, x: jax.Array, positions: Any = None, mask: Any = None) -> jax.Array:
        return nnx.merge(self.graphs["layer"], own)(x, positions, mask)

    def head(self, own: Any, x: jax.Array, batch: Batch, embedding: Any = None) -> jax.Array:
        norm = nnx.merge(self.graphs["norm"], own["norm"])
        if self.tied:
            logits = nnx.merge(self.graphs["embed"], embedding).attend
        else:
            logits = nnx.merge(self.graphs["lm_head"], own["lm_head"])
        return mean_cross_entropy(logits, norm(x), batch.targets)
