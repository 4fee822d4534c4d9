"""What a state of eight bits costs in loss and time, beside float32, bfloat16 and a peer, on real text.

    python benchmarks/eight_bits.py --text corpus.txt.xz

All runs of an optimizer have the same rates, data and initialization; only the dtype of the state changes,
and how it is rounded. The peer is the 8-bit AdamW of rollfast 1.3.0, which asks for Python 3.12. The script
writes every finished run to `docs/results/eight_bits.json` at once. Stopped (Ctrl-C, SIGTERM) and started
again, it continues the interrupted run bit for bit. `--times` then measures steps, all rows in one process.
"""

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from results import Results, mean_and_deviation

import gum_optax as go
from gum_optax._core.trees import columns
from gum_optax._linalg.quantize import dequantize, quantize

import short_runs
from trainings import finished, run, step_seconds

# Importing `trainings` put the examples on the path.
from corpus import Corpus  # isort: skip
from llama import SIZES  # isort: skip
from optimizers import OPTIMIZERS, OTHERS, Maker, Settings, adamw_8bit, by_kind  # isort: skip
from training import StopSignal, Trainer  # isort: skip

ROUNDS, STEPS = 7, 10  # of the times


class NearestState(NamedTuple):
    """State of `trace_to_nearest`."""

    codes: Any
    scales: Any


def trace_to_nearest(decay: float) -> optax.GradientTransformation:
    """A momentum of eight bits that is rounded to nearest."""

    def state_of(momentum):
        return NearestState(*columns(momentum, jax.tree.map(quantize, momentum), 2))

    def update(updates, state, params=None):
        del params
        momentum = jax.tree.map(lambda c, s, g: decay * dequantize(c, s) + g, *state, updates)
        state = state_of(momentum)
        return jax.tree.map(dequantize, *state), state

    return optax.GradientTransformation(lambda params: state_of(jax.tree.map(jnp.zeros_like, params)), update)


def gum_to_nearest(s: Settings, lr: Any, **arguments: Any) -> optax.GradientTransformation:
    inner = optax.chain(trace_to_nearest(0.95), go.orthogonalize(go.fastest_newton_schulz, batched=True))
    rule = go.unbiased_low_rank(
        inner, s.rank, s.period, s.full_rank_fraction, key=s.seed, projector_dtype="int8"
    )
    return go.matrix_optimizer(rule, lr, go.shape_factor(0.2), **arguments)


def rollfast_adamw(lr: Any, weight_decay: float) -> optax.GradientTransformation:
    return importlib.import_module("rollfast.optim.adam8").adamw8(lr, b2=0.95, weight_decay=weight_decay)


def of_all_leaves(make: Callable[[Any, float], optax.GradientTransformation]) -> tuple[Maker, float]:
    """AdamW of some kind for the matrices; `others` says of which kind for the other leaves."""
    return lambda s, lr, **kw: by_kind(make, lr, **kw), OPTIMIZERS["adamw"][1]


class EightBitTrainer(Trainer):
    """A trainer that knows the variants and the peer."""

    makers = OPTIMIZERS | {
        "gum, to nearest": (gum_to_nearest, OPTIMIZERS["gum"][1]),
        "adamw_8bit": of_all_leaves(adamw_8bit),
        "rollfast": of_all_leaves(rollfast_adamw),
    }
    others_makers = OTHERS | {"rollfast": rollfast_adamw}


class Row(NamedTuple):
    """A line of the table."""

    optimizer: str
    momentum_dtype: str
    others: str
    beside: str  # the row in float32


ROWS = {
    "gum": Row("gum", "float32", "adamw", "gum"),
    "gum, momentum in bfloat16": Row("gum", "bfloat16", "adamw", "gum"),
    "gum, int8": Row("gum", "int8", "adamw", "gum"),
    "gum, int8 to nearest": Row("gum, to nearest", "float32", "adamw", "gum"),
    "gum, int8, others adamw_8bit": Row("gum", "int8", "adamw_8bit", "gum"),
    "muon": Row("muon", "float32", "adamw", "muon"),
    "muon, momentum in bfloat16": Row("muon", "bfloat16", "adamw", "muon"),
    "muon, int8": Row("muon", "int8", "adamw", "muon"),
    "adamw": Row("adamw", "float32", "adamw", "adamw"),
    "adamw_8bit": Row("adamw_8bit", "float32", "adamw_8bit", "adamw"),
    "rollfast's adamw8": Row("rollfast", "float32", "rollfast", "adamw"),
}


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each row: its losses, and loss, state and time beside those of float32."""
    head = ["", "loss (seeds)", "beyond float32", "state", "of float32's"]
    lines = [head + ["time of a step, of float32's"] * any("seconds" in row for row in rows.values())]
    for name, row in rows.items():
        beside = rows.get(ROWS[name].beside, row)
        losses = list(row["losses"].values())
        cells = [name, mean_and_deviation(losses), "", f"{row['state'] / 2**20:.2f} MiB", ""]
        if beside is not row:
            # Paired by seed.
            pairs = [(loss, beside["losses"].get(seed)) for seed, loss in row["losses"].items()]
            cells[2] = f"{statistics.fmean(a - b for a, b in pairs if b is not None):+.4f}"
            cells[4] = f"{row['state'] / beside['state']:.3f}"
            if "seconds" in row and "seconds" in beside:
                cells.append(f"{row['seconds'] / beside['seconds']:.2f}")
        lines.append(cells + [""] * (len(lines[0]) - len(cells)))
    rule = "|---" * len(lines[0]) + "|"
    first, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return [first, rule, *rest]


def settings(options: argparse.Namespace, corpus: Corpus, row: Row, seed: int) -> Settings:
    return short_runs.settings(
        options,
        corpus,
        optimizer=row.optimizer,
        lr=EightBitTrainer.makers[row.optimizer][1],
        others_lr=options.others_lr,
        seed=seed,
        momentum_dtype=row.momentum_dtype,
        others=row.others,
    )


def state_bytes(trainer: Trainer) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trainer.state[1]))


def main(argv: list[str] | None = None) -> None:
    p = short_runs.parser(__doc__, steps=1000, seeds="0,1,2")
    p.add_argument("--rows", help="some, separated by semicolons; default: all that can be imported")
    p.add_argument("--others-lr", type=float, default=1e-2, help="for embedding, head and norms")
    p.add_argument("--times", action="store_true", help="measure steps only, all rows in one process")
    options = p.parse_args(argv)
    corpus, stop = Corpus(options.text, SIZES[options.model].vocabulary), StopSignal()
    results = Results(options.out / "eight_bits.json", table)
    has_peer = importlib.util.find_spec("rollfast") is not None
    importable = [name for name, row in ROWS.items() if has_peer or row.optimizer != "rollfast"]
    names = options.rows.split(";") if options.rows else importable
    protocol = f"validation loss, {short_runs.protocol(options)}"
    if options.times:
        known = results.rows(protocol)
        chosen = {name: settings(options, corpus, ROWS[name], 0) for name in names if name in known}
        trainers = {name: EightBitTrainer(s, corpus) for name, s in chosen.items()}
        for name, seconds in step_seconds(trainers, ROUNDS, STEPS).items():
            known[name]["seconds"] = seconds
        results.add(protocol, known, "flax")
    for seed in () if options.times else map(int, options.seeds.split(",")):
        for name in names:
            rows = results.rows(protocol)
            row = rows.setdefault(name, {"losses": {}, "state": 0})
            if str(seed) in row["losses"]:
                continue
            place = options.out / "unfinished" / f"{name}, {seed}"
            chosen = settings(options, corpus, ROWS[name], seed)
            record = finished(
                run(corpus, chosen, place, stop, EightBitTrainer, finish=lambda t: {"state": state_bytes(t)})
            )
            row["losses"][str(seed)], row["state"] = record["val_loss"], record["state"]
            results.add(protocol, rows, "flax")
            print(json.dumps({"run": place.name, "loss": record["val_loss"]}), flush=True)
    print(results.text())


if __name__ == "__main__":
    main()
