"""Compare optimizers on the default corpus: each at its best learning rate of one grid, three seeds.

    python benchmarks/corpus_comparison.py

The grid is 1.5e-3 times the powers of two, unbounded. The search starts at an optimizer's default and moves
to the better side until both neighbours of the best rate are worse.

The script writes every finished run to `docs/results/comparison.json` at once. Stopped (Ctrl-C, SIGTERM) and
started again, it continues the interrupted run bit for bit. It measures the cost of a step last, round-robin
in one process; `--costs` measures only that.
"""

import argparse
import dataclasses
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib
import optax

import gum_optax as go

from trainings import ROOT, best_rate, finished, next_rates, run, step_seconds

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Importing `trainings` put the examples on the path.
from corpus import Corpus, replace_file  # isort: skip
from llama import SIZES  # isort: skip
from optimizers import OPTIMIZERS, OTHERS_LR, Maker, Settings, completed  # isort: skip
from training import StopSignal, Trainer  # isort: skip

GRID_UNIT = 1.5e-3
SEEDS = (0, 1, 2)
MODEL, STEPS, BATCH, SEQ, PERIOD = "3m", 300, 8, 128, 50
SPEED_ROUNDS, SPEED_STEPS = 9, 5


def gum_by_neuron(s: Settings, lr: Any, **arguments: Any) -> optax.GradientTransformation:
    """GUM whose steps get NorMuon's size for each neuron."""
    rule = go.unbiased_low_rank(
        go.scale_by_muon(batched=True), s.rank, s.period, s.full_rank_fraction, key=s.seed
    )
    scale = optax.chain(go.scale_by_neuron_rms(), go.scale_by_shape())
    return go.matrix_optimizer(rule, lr, scale, **arguments)


def cautious(name: str) -> tuple[Maker, float]:
    """An optimizer that decays the matrices only where its step agrees."""
    make, rate = OPTIMIZERS[name]
    return lambda s, lr, weight_decay, **kw: make(
        s, lr, weight_decay=go.cautious_weight_decay(weight_decay), **kw
    ), rate


def in_eight_bits(name: str) -> tuple[Maker, float]:
    make, rate = OPTIMIZERS[name]
    return lambda s, lr, **kw: make(dataclasses.replace(s, momentum_dtype="int8"), lr, **kw), rate


# The optimizers of the examples, and parts of the library on top of two of them.
MAKERS: dict[str, tuple[Maker, float]] = OPTIMIZERS | {
    "gum, a size for each neuron": (gum_by_neuron, OPTIMIZERS["gum"][1]),
    **{f"{name}, cautious decay": cautious(name) for name in ("muon", "gum")},
    **{f"{name}, int8": in_eight_bits(name) for name in ("muon", "gum")},
}


class VariantTrainer(Trainer):
    """A trainer that knows them all."""

    makers = MAKERS


def settings(corpus: Corpus, optimizer: str, lr: float, seed: int) -> Settings:
    return Settings(
        optimizer=optimizer,
        model=MODEL,
        steps=STEPS,
        batch=BATCH,
        seq=SEQ,
        lr=lr,
        others_lr=OTHERS_LR,
        rank=SIZES[MODEL].rank,
        period=PERIOD,
        full_rank_fraction=1 / 16,
        weight_decay=0.1,
        seed=seed,
        text=corpus.name,
    )


class Results:
    """The JSON file, written after every run. All its runs follow one protocol."""

    def __init__(self, path: Path, corpus: Corpus):
        self.path = path
        protocol = dataclasses.asdict(settings(corpus, "", 0.0, 0))
        protocol = {key: value for key, value in protocol.items() if key not in ("optimizer", "lr", "seed")}
        fresh = {"protocol": protocol, "runs": [], "costs": {}}
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else fresh
        if completed(Settings, self.data["protocol"]) != protocol:
            raise SystemExit(f"{path} holds runs of another protocol; give another --out.")

    def find(self, optimizer: str, lr: float, seed: int) -> dict[str, Any] | None:
        wanted = (optimizer, lr, seed)
        return next((r for r in self.data["runs"] if (r["optimizer"], r["lr"], r["seed"]) == wanted), None)

    def tried(self, optimizer: str) -> dict[float, float]:
        """Learning rates tried at the first seed, and their losses."""
        runs = [r for r in self.data["runs"] if (r["optimizer"], r["seed"]) == (optimizer, SEEDS[0])]
        return {r["lr"]: r["val_loss"] for r in runs}

    def next_rate(self, optimizer: str) -> float | None:
        """The learning rate to try next; `None` when the best one has two worse neighbours."""
        start = GRID_UNIT * 2 ** round(math.log2(MAKERS[optimizer][1] / GRID_UNIT))
        return next(iter(next_rates(self.tried(optimizer), start)), None)

    def best_rate(self, optimizer: str) -> float | None:
        """The best learning rate at the first seed, once the search is done."""
        return None if self.next_rate(optimizer) else best_rate(self.tried(optimizer))

    def add(self, record: dict[str, Any]) -> None:
        self.data["runs"].append(record)
        self.save()

    def save(self) -> None:
        self.data["versions"] = {"python": platform.python_version(), "jax": jax.__version__}
        self.data["machine"] = (
            f"{jax.device_count()} {jax.devices()[0].device_kind} device, {platform.machine()}"
        )
        replace_file(self.path, lambda part: part.write_text(json.dumps(self.data, indent=1)))


def costs(corpus: Corpus, results: Results, optimizers: list[str]) -> None:
    """Memory and time of a step: medians of rounds in which every optimizer takes a few steps in turn."""
    rates = {name: results.best_rate(name) or MAKERS[name][1] for name in optimizers}
    trainers = {name: VariantTrainer(settings(corpus, name, rates[name], 0), corpus) for name in optimizers}
    seconds = step_seconds(trainers, SPEED_ROUNDS, SPEED_STEPS)
    results.data["costs"] |= {
        name: {
            "state_mib": trainer.optimizer_bytes() / 2**20,
            "peak_step_mib": (trainer.peak_bytes() or 0) / 2**20,
            "step_ms": 1000 * seconds[name],
            "tokens_per_second": BATCH * SEQ / seconds[name],
        }
        for name, trainer in trainers.items()
    }
    results.save()


def summarize(results: Results) -> list[dict[str, Any]]:
    """A row for each optimizer whose runs are complete, the lowest loss first."""
    rows = []
    for name in MAKERS:
        lr = results.best_rate(name)
        runs = [r for seed in SEEDS if lr and (r := results.find(name, lr, seed))]
        if len(runs) < len(SEEDS) or name not in results.data["costs"]:
            continue
        losses = [r["val_loss"] for r in runs]
        row = {
            "optimizer": name,
            "lr": lr,
            "val_loss": statistics.fmean(losses),
            "sd": statistics.stdev(losses),
        }
        rows.append(row | results.data["costs"][name])
    return sorted(rows, key=lambda row: row["val_loss"])


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    lines = [
        "| optimizer | learning rate | validation loss (3 seeds) | state MiB | peak step MiB | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['optimizer']}` | {row['lr']:g} | {row['val_loss']:.4f} ± {row['sd']:.4f}"
            f" | {row['state_mib']:.1f} | {row['peak_step_mib']:.1f} | {row['tokens_per_second']:.0f} |"
        )
    path.write_text("\n".join(lines) + "\n")


def plot(results: Results, rows: list[dict[str, Any]], path: Path) -> None:
    """Every seed's loss, best optimizer first, and the mean loss against the optimizer's state."""
    figure, (dots, memory) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for place, row in enumerate(rows):
        found = [results.find(row["optimizer"], row["lr"], seed) for seed in SEEDS]
        losses = [record["val_loss"] for record in found if record]
        dots.plot(losses, [place] * len(losses), "o", color="C0", alpha=0.6)
        memory.plot(row["state_mib"], row["val_loss"], "o", color="C0")
        where = (row["state_mib"], row["val_loss"])
        memory.annotate(row["optimizer"], where, xytext=(5, 3), textcoords="offset points", fontsize=8)
    dots.set_yticks(range(len(rows)), [f"{row['optimizer']} ({row['lr']:g})" for row in rows])
    dots.invert_yaxis()
    dots.set(xlabel="final validation loss", title="three seeds at the best learning rate")
    memory.set(xlabel="optimizer state (MiB)", ylabel="final validation loss", title="loss against memory")
    for axes in (dots, memory):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare(corpus: Corpus, results: Results, name: str, stop: StopSignal) -> None:
    """Do the missing runs of one optimizer: the search, then the other seeds."""

    def do(lr: float, seed: int) -> None:
        start = time.perf_counter()
        place = results.path.parent / "unfinished" / f"{name}-{lr:g}-{seed}"
        record = finished(run(corpus, settings(corpus, name, lr, seed), place, stop, VariantTrainer))
        results.add({"optimizer": name, "lr": lr, "seed": seed} | record)
        took = time.perf_counter() - start
        print(f"{name} lr={lr:g} seed={seed}: {record['val_loss']:.4f} ({took:.0f} s)", flush=True)

    while (lr := results.next_rate(name)) is not None:
        do(lr, SEEDS[0])
    best = results.best_rate(name)
    assert best is not None
    for seed in SEEDS[1:]:
        if results.find(name, best, seed) is None:
            do(best, seed)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument(
        "--optimizers", default=";".join(MAKERS), help="some, separated by semicolons; default: all"
    )
    p.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    p.add_argument("--costs", action="store_true", help="measure what a step costs, and train nothing")
    options = p.parse_args()
    optimizers = options.optimizers.split(";")
    corpus = Corpus(None, SIZES[MODEL].vocabulary)
    results = Results(options.out / "comparison.json", corpus)
    stop = StopSignal()
    if not options.costs:
        for name in optimizers:
            compare(corpus, results, name, stop)
    if options.costs or any(name not in results.data["costs"] for name in optimizers):
        costs(corpus, results, optimizers)
    rows = summarize(results)
    write_table(rows, options.out / "comparison.md")
    if rows:
        plot(results, rows, options.out / "comparison.png")
    print((options.out / "comparison.md").read_text())


if __name__ == "__main__":
    main()
