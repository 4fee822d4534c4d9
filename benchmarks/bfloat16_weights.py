"""What weights in bfloat16 cost in loss on real text: rounded to nearest, or stochastically.

    python benchmarks/bfloat16_weights.py --text corpus.txt.xz

All runs have the same optimizer, rates, data and initialization; only the dtype of the weights changes, and
how a step is added to them. The script writes every finished run to `docs/results/bfloat16_weights.json` at
once. Stopped (Ctrl-C, SIGTERM) and started again, it continues the interrupted run bit for bit.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import optax
from results import RESULTS, Results

from runs import run

# Importing `runs` put the examples on the path.
from corpus import Corpus  # isort: skip
from llama import SIZES  # isort: skip
from optimizers import OPTIMIZERS, Settings  # isort: skip
from training import StopSignal, Trainer  # isort: skip


class ToNearest(Trainer):
    """A trainer that adds steps as optax does."""

    @staticmethod
    def apply_updates(params: Any, updates: Any, key: Any, step: Any, context: Any = None) -> Any:
        del key, step, context
        return optax.apply_updates(params, updates)


# The dtype of the weights, and the trainer that adds the steps.
COLUMNS: dict[str, tuple[str, type[Trainer]]] = {
    "float32": ("float32", Trainer),
    "bfloat16, to nearest": ("bfloat16", ToNearest),
    "bfloat16, stochastic": ("bfloat16", Trainer),
}


def table(runs: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Mean and deviation over the seeds, one column for each way to keep the weights."""
    lines = [f"| optimizer | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in runs.items():
        cells = []
        for column in COLUMNS:
            losses = list(row.get(column, {}).values())
            spread = f" ± {statistics.stdev(losses):.4f} ({len(losses)})" if len(losses) > 1 else ""
            cells.append(f"{statistics.fmean(losses):.4f}{spread}" if losses else "")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def settings(options: argparse.Namespace, corpus: Corpus, name: str, seed: int, dtype: str) -> Settings:
    return Settings(
        optimizer=name,
        model=options.model,
        steps=options.steps,
        batch=options.batch,
        seq=options.seq,
        lr=OPTIMIZERS[name][1],
        others_lr=options.others_lr,
        rank=SIZES[options.model].rank,
        period=100,
        full_rank_fraction=1 / 16,
        weight_decay=0.1,
        seed=seed,
        text=corpus.name,
        weights_dtype=dtype,
    )


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, help="default: chitchat-dataset")
    p.add_argument("--optimizers", default="adamw,gum")
    p.add_argument("--seeds", default="0,1")
    p.add_argument("--model", choices=SIZES, default="0.6m")
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seq", type=int, default=64)
    p.add_argument("--others-lr", type=float, default=1e-2, help="for embedding, head and norms")
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    corpus, stop = Corpus(options.text, SIZES[options.model].vocabulary), StopSignal()
    results = Results(options.out / "bfloat16_weights.json", table)
    tokens = f"{options.batch} × {options.seq} tokens"
    protocol = f"validation loss, {options.model}, {options.steps} steps of {tokens}"
    protocol += f", {options.others_lr:g} for embedding, head and norms"
    for seed in map(int, options.seeds.split(",")):
        for name in options.optimizers.split(","):
            for column, (dtype, trainer) in COLUMNS.items():
                runs: dict[str, Any] = results.rows(protocol)
                losses = runs.setdefault(name, {}).setdefault(column, {})
                if str(seed) in losses:
                    continue
                place = options.out / "unfinished" / f"{name}, {column}, {options.others_lr:g}, {seed}"
                record = run(corpus, settings(options, corpus, name, seed, dtype), place, stop, trainer)
                if record is None:
                    raise SystemExit("Stopped and saved; the same command goes on.")
                losses[str(seed)] = record["val_loss"]
                results.add(protocol, runs, "flax")
                print(json.dumps({"run": str(place.name), "loss": record["val_loss"]}), flush=True)
    print(results.text())


if __name__ == "__main__":
    main()
