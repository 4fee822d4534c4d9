"""What grows how: time, state and temporaries of an update against the number of layers, the rank, the width.

    python benchmarks/scaling.py

Decoder matrices are separate leaves, and one size at a time varies from a common middle. Temporaries are
exact (`memory_analysis()`), and times are medians of ordinary steps. The script writes
`docs/results/scaling.json` and a figure beside it.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import memory
import speed
from results import RESULTS, versions

import gum_optax as go

# Sizes vary one at a time from the middle.
MIDDLE = {"width": 256, "layers": 8, "rank": 32}
SWEEPS = {"layers": (2, 4, 8, 16), "rank": (8, 32, 128), "width": (64, 128, 256, 512)}
SMALL = {"layers": (1, 2), "rank": (2, 4), "width": (16, 32)}
NAMES = ("optax.contrib.muon", "gum", "galore_muon", "optax.adamw")
QUANTITIES = {"step": "ms a step", "state": "state / gradients", "temporaries": "temporaries / gradients"}


def point(name: str, width: int, layers: int, rank: int, rounds: int) -> dict[str, float]:
    """Milliseconds, and bytes over the bytes of the gradients."""
    tx = speed.optimizers(rank)[name]()
    ff = 8 * width // 3
    timed = speed.Timed(tx, speed.gradients_of(width, ff, layers, scanned=False))
    timed.first()
    seconds = statistics.median(timed.next() for _ in range(rounds))
    report = go.memory_report(tx, memory.layers(width, ff, layers, scanned=False))
    analysis = timed.update.memory_analysis()
    assert analysis is not None
    return {
        "step": 1e3 * seconds,
        "compile": timed.compile_seconds,
        "state": sum(report.state.values()) / report.gradients,
        "temporaries": analysis.temp_size_in_bytes / report.gradients,
    }


def measure(sweeps: dict[str, tuple[int, ...]], middle: dict[str, int], rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for axis, values in sweeps.items():
        for name in NAMES:
            rows = [point(name, **(middle | {axis: value}), rounds=rounds) for value in values]
            found.setdefault(axis, {})[name] = dict(zip(map(str, values), rows, strict=True))
            print(f"{axis} {name}: {[round(row['step'], 1) for row in rows]} ms", flush=True)
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    figure, grid = plt.subplots(len(QUANTITIES), len(found), figsize=(10, 8), layout="constrained")
    for column, (axis, rows) in enumerate(found.items()):
        for row, (quantity, label) in enumerate(QUANTITIES.items()):
            axes = grid[row][column]
            for name, points in rows.items():
                axes.plot([int(x) for x in points], [p[quantity] for p in points.values()], "o-", label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log" if quantity != "state" else "linear")
            axes.set(xlabel=axis if row == len(QUANTITIES) - 1 else "", ylabel=label if column == 0 else "")
            axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--small", action="store_true", help="two tiny points for each axis, to check that it runs"
    )
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    middle = {"width": 32, "layers": 2, "rank": 4} if options.small else MIDDLE
    found = measure(SMALL if options.small else SWEEPS, middle, options.rounds)
    device = jax.devices()[0].device_kind
    options.out.mkdir(parents=True, exist_ok=True)
    data = {"versions": versions(), "device": device, "middle": middle, "axes": found}
    (options.out / "scaling.json").write_text(json.dumps(data, indent=1) + "\n")
    plot(found, options.out / "scaling.png")


if __name__ == "__main__":
    main()
