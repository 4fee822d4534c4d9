"""The trainer of `finetune.py`: from a checkpoint, of a part of it, with heads or subspaces apart."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx

import gum_optax

from llama import Llama
from lora import LORA, add_adapters, merge_adapters
from losses import Batch
from optimizers import OPTIMIZERS, Maker, Settings, schedule
from pretrained import load
from supervised import Windows
from training import Trainer

VALIDATION_BATCHES = 16


@dataclasses.dataclass(frozen=True)
class FinetuneSettings(Settings):
    """The settings of a fine-tuning run."""

    last_layers: int = 0  # train only these; 0: every parameter
    lora_rank: int = 0
    head_dim: int = 0  # cuts queries, keys and values into matrices of this width; 0: whole kernels
    protect: float = 0.0  # the fraction of each matrix's singular vectors that must stay


def by_head(make: Maker) -> Maker:
    """The same optimizer, to which each head may be a matrix of its own."""

    def made(s: FinetuneSettings, lr: Any, **arguments: Any) -> optax.GradientTransformation:
        if not s.head_dim:
            return make(s, lr, **arguments)
        heads = gum_optax.Parts(head_dim=s.head_dim)
        patterns = {f"*{name}/kernel": heads for name in ("query", "key", "value")}
        return make(s, lr, weight_dimension_numbers=patterns, **arguments)

    return made


def _protected(make: Maker) -> Maker:
    """The same optimizer, whose changes may stay off the top singular vectors of the weights."""

    def made(s: FinetuneSettings, lr: Any, **arguments: Any) -> optax.GradientTransformation:
        tx = make(s, lr, **arguments)
        return gum_optax.protect(tx, gum_optax.protected_subspace(s.protect)) if s.protect else tx

    return made


# Walks along random directions, without gradients and without a state (MeZO, arXiv 2305.17333).
MEZO: tuple[Maker, float] = (lambda s, lr, **arguments: optax.set_to_zero(), 1e-6)

BY_HEAD = {name: (by_head(make), lr) for name, (make, lr) in OPTIMIZERS.items() if name != "adamw"}
PROTECTED = {name: (_protected(make), lr) for name, (make, lr) in (OPTIMIZERS | BY_HEAD).items()}
KNOWN = PROTECTED | {"lora": LORA, "mezo": MEZO}


class FineTuner(Trainer):
    """A trainer that starts from a checkpoint and may train a part of it."""

    makers = KNOWN
    settings: FinetuneSettings
    corpus: Windows

    def __init__(self, settings: FinetuneSettings, windows: Windows, checkpoint: Path):
        self.checkpoint = checkpoint
        super().__init__(settings, windows)

    def make_model(self, dtype: Any) -> Llama:
        s = self.settings
        model = load(self.checkpoint, dtype, s.weights_dtype)
        if s.optimizer == "lora":
            add_adapters(model, s.lora_rank, self.first_layer(model), nnx.Rngs(s.seed))
        return model

    def first_layer(self, model: Llama) -> int:
        """The first layer that is trained."""
        return len(model.layers) - self.settings.last_layers if self.settings.last_layers else 0

    def trained(self, model: Llama) -> Any:
        s = self.settings
        if s.optimizer == "lora":
            return nnx.LoRAParam
        if not s.last_layers:
            return nnx.Param
        first = self.first_layer(model)

        def in_last_layers(path: Any, _: Any) -> bool:
            return path[0] == "layers" and path[1] >= first

        return nnx.All(nnx.Param, in_last_layers)

    def _step(
        self, state: Any, frozen: Any, batch: Batch, step: Any
    ) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
        s = self.settings
        if s.optimizer != "mezo":
            return super()._step(state, frozen, batch, step)
        params, opt_state = state
        value, slope, params = gum_optax.project_loss(
            lambda params: self._loss(params, frozen, batch), params, s.seed, step
        )
        size = -slope * schedule(s, s.lr)(step)
        params = gum_optax.walk(params, s.seed, size, step)
        return (params, opt_state), value, {"slope": slope}

    def batch(self, step: int) -> Batch:
        return self.corpus.batch(step, batch=self.settings.batch, seed=self.settings.seed)

    def validation_batches(self) -> list[Batch]:
        return self.corpus.validation_batches(batch=self.settings.batch, most=VALIDATION_BATCHES)

    def held_out_loss(self, windows: Windows) -> float:
        """The held-out loss of other data."""
        batches = windows.validation_batches(batch=self.settings.batch, most=VALIDATION_BATCHES)
        return self.validation_loss(batches)

    def finished(self) -> Llama:
        """The model with the present weights, adapters merged."""
        # `merge` shares the variables of the states, and merging the adapters changes them.
        model = nnx.clone(self.model(self.state[0], self.frozen))
        if self.settings.optimizer == "lora":
            merge_adapters(model)
        return model
