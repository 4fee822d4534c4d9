"""What a rule with little state costs in loss for embedding and head, beside AdamW, on real text.

    python benchmarks/embedding_rules.py --text corpus.txt.xz

GUM updates the hidden matrices at one rate in all runs. The rate of each rule is searched on a grid of powers
of two at seed 0, until both neighbours of the best one are worse; the other seeds then run at the best rate.
The script writes every finished run to `docs/results/embedding_rules.json` at once, and continues an
interrupted run bit for bit.
"""

import json
import statistics
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from results import Results, mean_and_deviation

import gum_optax as go

import short_runs
from trainings import best_rate, finished, next_rates, run

# Importing `trainings` put the examples on the path.
from corpus import Corpus  # isort: skip
from llama import SIZES, Llama  # isort: skip
from optimizers import OPTIMIZERS, OTHERS, OthersMaker  # isort: skip
from training import StopSignal, Trainer  # isort: skip

# The rate that the search starts from; a step of each rule has elements of about one.
START = 4e-2


class ByTokenState(NamedTuple):
    """State of `by_token`."""

    count: Any
    nu: Any  # for each table, a number for each token


def token_axis(x: Any) -> int:
    """The axis along which the tokens of a table lie: the longer one."""
    return int(x.shape[1] > x.shape[0])


def by_token(b2: float = 0.95, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam without a first moment, whose second moment is a mean over the width: a number for each token."""

    def mean(x):
        return jnp.mean(x, axis=1 - token_axis(x), keepdims=True)

    def init(params):
        return ByTokenState(jnp.zeros((), jnp.int32), jax.tree.map(lambda x: mean(jnp.zeros_like(x)), params))

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * mean(g * g), state.nu, updates)
        steps = jax.tree.map(lambda v, g: g / (jnp.sqrt(v / (1 - b2**count)) + eps), nu, updates)
        return steps, ByTokenState(count, nu)

    return optax.GradientTransformation(init, update)


def unit_tokens(x: jax.Array) -> jax.Array:
    """The step of each token to RMS one."""
    return go.unit_rows(x) if token_axis(x) == 0 else go.unit_rows(x.T).T


def for_tables(rule: optax.GradientTransformation) -> Any:
    """`rule` for embedding and head, AdamW for vectors; both with decay and rate."""

    def make(lr: Any, weight_decay: float) -> optax.GradientTransformation:
        tables = optax.chain(rule, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(lr))
        rules: dict[Hashable, optax.GradientTransformation] = {
            "tables": tables,
            "vectors": OTHERS["adamw"](lr, weight_decay),
        }
        return optax.partition(
            rules, lambda params: jax.tree.map(lambda x: "tables" if x.ndim > 1 else "vectors", params)
        )

    return make


def adafactor_with_momentum(lr: Any, weight_decay: float) -> optax.GradientTransformation:
    """`adafactor` of the examples with an average of its steps in bfloat16: a quarter of AdamW's state."""
    average = optax.ema(0.9, debias=False, accumulator_dtype=jnp.bfloat16)
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=32),
        optax.clip_by_block_rms(1.0),
        average,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(lr),
    )


RULES: dict[str, OthersMaker] = OTHERS | {
    "second moment by token": for_tables(by_token()),
    "sinkgd": for_tables(go.normalize(go.sinkhorn)),
    "norm of each token": for_tables(go.normalize(unit_tokens)),
    "sign": for_tables(optax.scale_by_sign()),
    "adafactor, momentum in bfloat16": adafactor_with_momentum,
}


class RuleTrainer(Trainer):
    """A trainer that knows these rules."""

    others_makers = RULES


def state_share(name: str, model: str) -> float:
    """The state of a rule for embedding, head and norms, over AdamW's."""
    module = nnx.eval_shape(lambda: Llama(SIZES[model], dtype=jnp.float32, rngs=nnx.Rngs(0)))
    params = nnx.split(module, nnx.Param)[1]
    leaves, treedef = jax.tree.flatten(params)
    entries = treedef.flatten_up_to(go.hidden_matrices(params))
    rest = [x for x, entry in zip(leaves, entries, strict=True) if entry is None]

    def size(rule: str) -> int:
        state = jax.eval_shape(RULES[rule](1e-3, 0.1).init, rest)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    return size(name) / size("adamw")


def tried(row: dict[str, Any]) -> dict[float, float]:
    """The loss at each rate that was tried."""
    return {float(rate): loss for rate, loss in row["rates"].items()}


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each rule: its best rate, its losses at that rate, its state over AdamW's."""
    lines = [
        "| embedding, head, norms | rate | validation loss (seeds) | beyond AdamW | state over AdamW's |",
        "|---|---|---|---|---|",
    ]

    def losses(row):
        return list(row["seeds"].values())

    for name, row in rows.items():
        if not row["seeds"]:
            continue
        found, beside = losses(row), losses(rows["adamw"])
        # Paired by seed.
        gap = statistics.fmean(a - b for a, b in zip(found, beside, strict=False))
        lines.append(
            f"| {name} | {best_rate(tried(row)):g} | {mean_and_deviation(found)} | {gap:+.4f}"
            f" | {100 * row['state']:.2f} % |"
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    p = short_runs.parser(__doc__, steps=300, seeds="0,1,2")
    p.add_argument("--rules", help="some, separated by semicolons; default: all")
    options = p.parse_args(argv)
    corpus, stop = Corpus(options.text, SIZES[options.model].vocabulary), StopSignal()
    results = Results(options.out / "embedding_rules.json", table)
    protocol = short_runs.protocol(options)
    first, *more = map(int, options.seeds.split(","))

    def loss_of(name: str, rate: float, seed: int) -> float:
        place = options.out / "unfinished" / f"{name}, {rate:g}, {seed}"
        chosen = short_runs.settings(
            options,
            corpus,
            optimizer="gum",
            lr=OPTIMIZERS["gum"][1],
            others_lr=rate,
            seed=seed,
            others=name,
        )
        record = finished(run(corpus, chosen, place, stop, RuleTrainer))
        print(json.dumps({"run": place.name, "loss": record["val_loss"]}), flush=True)
        return record["val_loss"]

    for name in options.rules.split(";") if options.rules else RULES:
        rows = results.rows(protocol)
        row = rows.setdefault(name, {"rates": {}, "seeds": {}, "state": state_share(name, options.model)})
        while rates := next_rates(tried(row), START):
            rate = rates[0]
            row["rates"][f"{rate:g}"] = loss_of(name, rate, first)
            results.add(protocol, rows, "flax")
        row["seeds"][str(first)] = min(row["rates"].values())
        results.add(protocol, rows, "flax")
        for seed in more:
            if str(seed) not in row["seeds"]:
                row["seeds"][str(seed)] = loss_of(name, best_rate(tried(row)), seed)
            results.add(protocol, rows, "flax")
    print(results.text())


if __name__ == "__main__":
    main()
