"""Compare optimizers on the default corpus: one grid of learning rates for all, three seeds of each best.

    python benchmarks/corpus_comparison.py

Every finished run is written to `docs/results/comparison.json` at once; started again, the script does
only what is missing. Speed is measured last, round-robin in one process; `--speed` measures it alone.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from corpus import Corpus  # noqa: E402
from llama import SIZES  # noqa: E402
from training import OPTIMIZERS, Settings, Trainer  # noqa: E402

GRID = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
SEEDS = (0, 1, 2)
MODEL, STEPS, BATCH, SEQ, PERIOD = "3m", 400, 8, 128, 50
EVALUATE_EVERY = 50
SPEED_ROUNDS = 15


def settings(corpus: Corpus, optimizer: str, lr: float, seed: int, steps: int = STEPS) -> Settings:
    return Settings(
        optimizer=optimizer,
        model=MODEL,
        steps=steps,
        batch=BATCH,
        seq=SEQ,
        lr=lr,
        rank=SIZES[MODEL].rank,
        period=PERIOD,
        full_rank_fraction=1 / 16,
        weight_decay=0.1,
        seed=seed,
        text=corpus.name,
    )


def run(corpus: Corpus, chosen: Settings) -> dict[str, Any]:
    """One run: its settings, its validation losses and what its step holds in memory."""
    trainer = Trainer(chosen, corpus)
    train, validation = [], {}
    for step in range(1, chosen.steps + 1):
        train.append(trainer.train_step()["train_loss"])
        if step % EVALUATE_EVERY == 0 or step == chosen.steps:
            validation[step] = trainer.validation_loss()
    return {
        **dataclasses.asdict(chosen),
        "val_loss": validation[chosen.steps],
        "validation": validation,
        "train_loss": [round(statistics.fmean(train[i : i + 10]), 4) for i in range(0, len(train), 10)],
        "state_mib": trainer.optimizer_bytes() / 2**20,
        "peak_step_mib": (trainer.peak_bytes() or 0) / 2**20,
    }


class Results:
    """The JSON file, written after every run."""

    def __init__(self, path: Path):
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}

    def find(self, optimizer: str, lr: float, seed: int) -> dict[str, Any] | None:
        wanted = (optimizer, lr, seed, STEPS)
        found = (r for r in self.data["runs"] if (r["optimizer"], r["lr"], r["seed"], r["steps"]) == wanted)
        return next(found, None)

    def best_rate(self, optimizer: str) -> float | None:
        """The grid's best learning rate at the first seed, once the grid is complete."""
        tried = [self.find(optimizer, lr, SEEDS[0]) for lr in GRID]
        if any(r is None for r in tried):
            return None
        return min((r for r in tried if r), key=lambda r: r["val_loss"])["lr"]

    def add(self, record: dict[str, Any]) -> None:
        self.data["runs"].append(record)
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.data["versions"] = {"python": platform.python_version(), "jax": jax.__version__}
        self.data["machine"] = (
            f"{jax.device_count()} {jax.devices()[0].device_kind} device, {platform.machine()}"
        )
        self.path.write_text(json.dumps(self.data, indent=1))


def speed(corpus: Corpus, results: Results, optimizers: list[str]) -> None:
    """Milliseconds of a step, the median of rounds in which every optimizer takes ten steps in turn."""
    rates = {name: results.best_rate(name) or OPTIMIZERS[name][1] for name in optimizers}
    trainers = {name: Trainer(settings(corpus, name, rates[name], 0), corpus) for name in optimizers}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(SPEED_ROUNDS):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            for _ in range(10):
                trainer.train_step()
            times[name].append((time.perf_counter() - start) / 10)
    tokens = BATCH * SEQ
    results.data["speed"] = {
        name: {
            "step_ms": 1000 * statistics.median(seconds),
            "tokens_per_second": tokens / statistics.median(seconds),
        }
        for name, seconds in times.items()
    }
    results.save()


def summarize(results: Results, optimizers: list[str]) -> list[dict[str, Any]]:
    """A row for each optimizer whose runs are complete."""
    rows = []
    for name in optimizers:
        lr = results.best_rate(name)
        runs = [r for seed in SEEDS if lr and (r := results.find(name, lr, seed))]
        if len(runs) < len(SEEDS):
            continue
        losses = [r["val_loss"] for r in runs]
        row = {
            "optimizer": name,
            "lr": lr,
            "val_loss": statistics.fmean(losses),
            "sd": statistics.stdev(losses),
        }
        row |= {"state_mib": runs[0]["state_mib"], "peak_step_mib": runs[0]["peak_step_mib"]}
        rows.append(row | results.data.get("speed", {}).get(name, {}))
    return rows


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    lines = [
        "| optimizer | learning rate | validation loss (3 seeds) | state MiB | peak step MiB | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else "not measured"
        lines.append(
            f"| `{row['optimizer']}` | {row['lr']:g} | {row['val_loss']:.4f} ± {row['sd']:.4f}"
            f" | {row['state_mib']:.1f} | {row['peak_step_mib']:.1f} | {rate} |"
        )
    path.write_text("\n".join(lines) + "\n")


def plot(results: Results, rows: list[dict[str, Any]], path: Path) -> None:
    figure, (grid, curve) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for row in rows:
        name, lr = row["optimizer"], row["lr"]
        tried = [(rate, r["val_loss"]) for rate in GRID if (r := results.find(name, rate, SEEDS[0]))]
        (line,) = grid.plot(*zip(*tried, strict=True), "o-", label=name)
        for seed in SEEDS:
            record = results.find(name, lr, seed)
            assert record is not None
            points = [(int(step) * BATCH * SEQ, loss) for step, loss in record["validation"].items()]
            label = f"{name} (lr {lr:g})" if seed == SEEDS[0] else None
            curve.plot(*zip(*points, strict=True), "-", color=line.get_color(), alpha=0.7, label=label)
    grid.set(xscale="log", xlabel="learning rate", ylabel="final validation loss", title="the grid, seed 0")
    grid.set_xticks(GRID, [f"{lr:g}" for lr in GRID], minor=False)
    grid.set_xticks([], minor=True)
    curve.set(xlabel="tokens", ylabel="validation loss", title="the best rate, three seeds")
    for axes in (grid, curve):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="default: all of examples/pretrain.py")
    p.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    p.add_argument("--speed", action="store_true", help="measure speed only")
    options = p.parse_args()
    optimizers = options.optimizers.split(",")
    corpus = Corpus(None, SIZES[MODEL].vocabulary)
    results = Results(options.out / "comparison.json")
    if not options.speed:
        wanted = [(name, lr, SEEDS[0]) for lr in GRID for name in optimizers]
        for grid_done in (False, True):
            if grid_done:
                best = {name: results.best_rate(name) for name in optimizers}
                wanted = [(name, lr, seed) for seed in SEEDS[1:] for name, lr in best.items() if lr]
            for name, lr, seed in wanted:
                if results.find(name, lr, seed) is None:
                    start = time.perf_counter()
                    record = run(corpus, settings(corpus, name, lr, seed))
                    results.add(record)
                    took = time.perf_counter() - start
                    print(
                        f"{name} lr={lr:g} seed={seed}: {record['val_loss']:.4f} ({took:.0f} s)", flush=True
                    )
    if options.speed or any(name not in results.data.get("speed", {}) for name in optimizers):
        speed(corpus, results, optimizers)
    rows = summarize(results, optimizers)
    write_table(rows, options.out / "comparison.md")
    if rows:
        plot(results, rows, options.out / "comparison.png")
    print((options.out / "comparison.md").read_text())


if __name__ == "__main__":
    main()
