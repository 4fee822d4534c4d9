"""GUM in Kauldron: a Linen decoder, trained, saved and resumed by `kd.train.Trainer`.

python examples/trainers/with_kauldron.py --steps 6 --out run
"""

import flax.linen as nn
import flax.struct
from kauldron import kd

import gum_optax

from counting import BATCH, GUM, VOCABULARY, Record, arguments, report, sequence


class Sequences:
    """A data source of Grain."""

    def __len__(self):
        return 10_000

    def __getitem__(self, number):
        tokens = sequence(number)
        return {"tokens": tokens[:-1], "next": tokens[1:, None]}


@flax.struct.dataclass
class Predictions:
    """The outputs that the loss reads."""

    logits: kd.typing.Float["*b l v"]


class Decoder(nn.Module):
    """One block of attention and one of a multilayer perceptron."""

    tokens: kd.kontext.Key = "batch.tokens"

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, 16, name="token_embedder")(tokens)
        attention = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")
        x = x + attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
        x = x + nn.Dense(16, name="down")(nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm()(x))))
        return Predictions(nn.Dense(VOCABULARY, name="lm_head")(x))


class Losses(kd.train.KDMetricWriter):
    """Also hands each step's loss to a record."""

    def write_scalars(self, step, scalars):
        super().write_scalars(step, scalars)
        Record(self.workdir)(step, scalars["losses/total"])


def main() -> None:
    asked = arguments(__doc__)
    everywhere = kd.sharding.FSDPSharding(min_size_to_shard_mb=0)
    trainer = kd.train.Trainer(
        seed=0,
        workdir=asked.out,
        train_ds=kd.data.py.DataSource(
            data_source=Sequences(), batch_size=BATCH, shuffle=False, num_workers=0
        ),
        model=Decoder(),
        train_losses={
            "next": kd.losses.SoftmaxCrossEntropyWithIntLabels(logits="preds.logits", labels="batch.next")
        },
        optimizer=gum_optax.gum(1e-2, **GUM),
        # The same strategy shards the state, because it reads shapes.
        sharding=kd.sharding.ShardingStrategy(params=everywhere, opt_state=everywhere),
        checkpointer=kd.ckpts.Checkpointer(save_interval_steps=1),
        num_train_steps=asked.steps,
        log_metrics_every=1,
        log_summaries_every=asked.steps + 1,
        writer=Losses(),
    )
    state, _ = trainer.train()
    report(state.opt_state)


if __name__ == "__main__":
    main()
