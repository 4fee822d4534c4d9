"""What a choice costs in loss on real text: the dtype of the momentum, the form of Newton-Schulz.

    python benchmarks/choices.py

Repeats the runs of `corpus_comparison.py`, each optimizer at its best rate there, with one thing changed. The
script writes every finished run to `docs/results/choices.json` at once, and skips runs that the file holds.
"""

import argparse
import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from results import RESULTS, Results, losses_table

import gum_optax as go

from corpus_comparison import settings
from trainings import run

# Importing `corpus_comparison` put the examples on the path.
from corpus import Corpus  # isort: skip
from optimizers import OPTIMIZERS, Settings  # isort: skip
from training import StopSignal, Trainer  # isort: skip

DEFAULT = "float32, as by default"
# One column for each change, with the settings of the run or the arguments of the optimizer that change.
MOMENTA = {"momentum in bfloat16": {"momentum_dtype": "bfloat16"}}
METHODS = {
    "`newton_schulz`": {"orthogonalizer": go.newton_schulz},
    "`newton_schulz` in bfloat16": {
        "orthogonalizer": functools.partial(go.newton_schulz, dtype=jnp.bfloat16)
    },
}


class ChoiceTrainer(Trainer):
    """A trainer that knows the optimizers with changed arguments."""

    makers = OPTIMIZERS | {
        f"{name}, {column}": (functools.partial(make, **arguments), rate)
        for name, (make, rate) in OPTIMIZERS.items()
        for column, arguments in METHODS.items()
    }


def changed(chosen: Settings, column: str) -> Settings:
    """A run's settings with the column's change."""
    chosen = dataclasses.replace(chosen, **MOMENTA.get(column, {}))
    if column not in METHODS:
        return chosen
    return dataclasses.replace(chosen, optimizer=f"{chosen.optimizer}, {column}")


def table(runs: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Mean and deviation over the seeds, one column for each choice."""
    return losses_table([DEFAULT, *MOMENTA, *METHODS], runs)


def jobs(options: argparse.Namespace, corpus: Corpus) -> Iterator[tuple[str, str, Settings]]:
    """Row, column and settings of every run."""
    for seed in map(int, options.seeds.split(",")):
        for name in options.optimizers.split(","):
            chosen = settings(corpus, name, OPTIMIZERS[name][1], seed)
            if options.steps:
                chosen = dataclasses.replace(chosen, steps=options.steps)
            for column in (DEFAULT, *MOMENTA, *METHODS):
                yield name, column, changed(chosen, column)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--optimizers", default="muon,galore_muon,gum")
    p.add_argument("--seeds", default="0,1")
    p.add_argument("--steps", type=int, help="default: those of corpus_comparison.py")
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    corpus, stop = Corpus(None, vocabulary=4096), StopSignal()
    results = Results(options.out / "choices.json", table)
    for name, column, chosen in jobs(options, corpus):
        protocol = f"validation loss, {chosen.model}, {chosen.steps} steps"
        runs: dict[str, Any] = results.data["settings"].get(protocol, {"rows": {}})["rows"]
        losses = runs.setdefault(name, {}).setdefault(column, {})
        if str(chosen.seed) in losses:
            continue
        with tempfile.TemporaryDirectory() as place:
            record = run(corpus, chosen, Path(place) / "run", stop, ChoiceTrainer)
        if record is None:
            return
        losses[str(chosen.seed)] = record["val_loss"]
        results.add(protocol, runs)
        print(json.dumps({name: {column: losses}}), flush=True)
    print(results.text())


if __name__ == "__main__":
    main()
