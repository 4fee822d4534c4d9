"""GUM in Tunix: a small LLaMA of `tunix.models`, trained, saved and resumed by `PeftTrainer`.

python examples/trainers/with_tunix.py --steps 6 --out run
"""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft.hooks import TrainingHooks
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

import gum_optax

from counting import GUM, LENGTH, VOCABULARY, Record, arguments, batches, report

TINY = ModelConfig(
    num_layers=2,
    vocab_size=VOCABULARY,
    embed_dim=16,
    hidden_dim=32,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-5,
)


@nnx.jit
def sharded_llama() -> Llama3:
    """The model, sharded by its variables over the mesh in force."""
    model = Llama3(TINY, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
    return model


def model_input(batch: TrainingInput) -> dict:
    """The inputs that the default loss of `PeftTrainer` needs from a batch."""
    shape = batch.input_tokens.shape
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(shape[1]), shape),
        "attention_mask": jnp.tril(jnp.ones((shape[0], shape[1], shape[1]), bool)),
    }


class Losses(TrainingHooks):
    """Hands each step's loss to a record."""

    def __init__(self, record: Record):
        self._record = record

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        self._record(train_step, train_loss)

    def on_train_start(self, train_ctx): ...
    def on_train_end(self, train_ctx): ...
    def on_train_step_start(self, train_ctx): ...
    def on_eval_step_start(self, train_ctx): ...
    def on_eval_step_end(self, train_ctx, eval_loss): ...


def main() -> None:
    asked = arguments(__doc__)
    config = TrainingConfig(
        eval_every_n_steps=asked.steps,
        max_steps=asked.steps,
        checkpoint_root_directory=str(asked.out / "checkpoints"),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=1, max_to_keep=2),
    )
    mesh = jax.make_mesh((jax.device_count(), 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    with mesh:
        trainer = PeftTrainer(sharded_llama(), gum_optax.gum(1e-2, **GUM), config)
        trainer = trainer.with_gen_model_input_fn(model_input)
        trainer.with_training_hooks(Losses(Record(asked.out)))
        # The trainer skips the batches that it has seen.
        trainer.train(TrainingInput(tokens, np.ones((len(tokens), LENGTH), bool)) for tokens in batches())
    report(trainer.optimizer.opt_state)


if __name__ == "__main__":
    main()
