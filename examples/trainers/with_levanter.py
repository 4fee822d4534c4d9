"""GUM in Levanter: its LLaMA, layers scanned, trained, saved and resumed by `levanter.trainer.Trainer`.

python examples/trainers/with_levanter.py --steps 6 --out run
"""

import haliax as hax
import jax
import jax.numpy as jnp
from levanter.checkpoint import CheckpointerConfig
from levanter.models.llama import LlamaConfig
from levanter.models.lm_model import LmExample
from levanter.tracker.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig

from gum_optax.trainers.levanter import GumConfig

from counting import BATCH, GUM, LENGTH, VOCABULARY, Record, arguments, batches, report

TINY = LlamaConfig(
    max_seq_len=LENGTH,
    hidden_dim=16,
    intermediate_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


def next_token_loss(model, example, key=None):
    return model.compute_next_token_loss(example, key=key)


def main() -> None:
    asked = arguments(__doc__)
    config = TrainerConfig(
        id="gum",
        seed=0,
        num_train_steps=asked.steps,
        train_batch_size=BATCH,
        tracker=NoopConfig(),
        checkpointer=CheckpointerConfig(base_path=str(asked.out / "checkpoints")),
        log_dir=asked.out,
        require_accelerator=False,
    )
    record = Record(asked.out)
    # A constant learning rate: a schedule would depend on the number of steps.
    optimizer = GumConfig(learning_rate=1e-2, weight_decay=0.0, lr_schedule="constant", warmup=0.0, **GUM)
    Batch, Pos, Vocab = config.TrainBatch, TINY.max_Pos, hax.Axis("vocab", VOCABULARY)
    with Trainer(config, optimizer.build(asked.steps), next_token_loss) as trainer:
        state = trainer.initial_state(
            jax.random.PRNGKey(0), model_init=lambda: TINY.build(Vocab, key=jax.random.PRNGKey(1))
        )
        info = None
        for number, tokens in enumerate(batches()):
            if number >= asked.steps:
                break
            if number < int(state.step):
                continue  # a batch from before the stop
            example = hax.vmap(LmExample.causal, Batch)(hax.named(jnp.asarray(tokens), (Batch, Pos)))
            info = trainer.train_step(state, hax.shard(example, trainer.compute_axis_mapping))
            state = info.state
            record(info.next_step, info.loss)
        if info is not None:
            trainer.run_hooks(info, force=True)  # the last checkpoint
    report(state.opt_state)


if __name__ == "__main__":
    main()
