"""What weights in bfloat16 cost in loss on real text: rounded to nearest, or stochastically.

    python benchmarks/bfloat16_weights.py --text corpus.txt.xz

All runs have the same optimizer, rates, data and initialization; only the dtype of the weights changes, and
how a step is added to them. The script writes every finished run to `docs/results/bfloat16_weights.json` at
once. Stopped (Ctrl-C, SIGTERM) and started again, it continues the interrupted run bit for bit.
"""

import json
from typing import Any

import optax
from results import Results, losses_table

import short_runs
from trainings import finished, run

# Importing `trainings` put the examples on the path.
from corpus import Corpus  # isort: skip
from llama import SIZES  # isort: skip
from optimizers import OPTIMIZERS  # isort: skip
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
    return losses_table(COLUMNS, runs)


def main(argv: list[str] | None = None) -> None:
    p = short_runs.parser(__doc__, steps=1000, seeds="0,1")
    p.add_argument("--optimizers", default="adamw,gum")
    p.add_argument("--others-lr", type=float, default=1e-2, help="for embedding, head and norms")
    options = p.parse_args(argv)
    corpus, stop = Corpus(options.text, SIZES[options.model].vocabulary), StopSignal()
    results = Results(options.out / "bfloat16_weights.json", table)
    protocol = f"validation loss, {short_runs.protocol(options)}"
    protocol += f", {options.others_lr:g} for embedding, head and norms"
    for seed in map(int, options.seeds.split(",")):
        for name in options.optimizers.split(","):
            for column, (dtype, trainer) in COLUMNS.items():
                runs: dict[str, Any] = results.rows(protocol)
                losses = runs.setdefault(name, {}).setdefault(column, {})
                if str(seed) in losses:
                    continue
                place = options.out / "unfinished" / f"{name}, {column}, {options.others_lr:g}, {seed}"
                chosen = short_runs.settings(
                    options,
                    corpus,
                    period=100,
                    optimizer=name,
                    lr=OPTIMIZERS[name][1],
                    others_lr=options.others_lr,
                    seed=seed,
                    weights_dtype=dtype,
                )
                record = finished(run(corpus, chosen, place, stop, trainer))
                losses[str(seed)] = record["val_loss"]
                results.add(protocol, runs, "flax")
                print(json.dumps({"run": str(place.name), "loss": record["val_loss"]}), flush=True)
    print(results.text())


if __name__ == "__main__":
    main()
