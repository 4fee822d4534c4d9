"""Seconds to compile an update of separate or scanned layers, and lines of the optimized HLO.

    python benchmarks/compilation.py
    python benchmarks/compilation.py --platform h200 --layers 12 --kinds separate,scanned    # see chips.py

The layers are decoder layers of width 512. Each compilation, tracing included, has a process of its own,
because a second compilation in one process is faster. Rounds go round-robin over the optimizers, and the
script reports medians. It merges the results into `docs/results/compilation.json` and writes the table of all
results beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import memory
import speed
from chips import CHIPS, PACKAGES, device_of, on_chip
from results import RESULTS, Results

COLUMNS = (("seconds", 1), ("lines", 0))  # and the digits shown
NAMES = (speed.PEER, "galore_muon", "gum", "sumo")


def compiled(name: str, platform: str, layers: int, kind: str) -> tuple[float, int]:
    """Seconds and lines, in this process."""
    width, ff, rank = memory.SIZES["512"]
    shapes = memory.layers(width, ff, layers, scanned=kind == "scanned")
    tx, device = speed.optimizers(rank)[name](), device_of(platform)
    start = time.perf_counter()
    arguments = on_chip((shapes, jax.eval_shape(tx.init, shapes), shapes), device)
    text = jax.jit(tx.update, donate_argnums=1).lower(*arguments).compile().as_text()
    assert text is not None
    return time.perf_counter() - start, text.count("\n")


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """One row for each optimizer, with its ratio to the peer."""
    lines = ["| optimizer | s | of optax's Muon | lines of HLO | of optax's Muon |", "|---" * 5 + "|"]
    for name, row in rows.items():
        cells = (f"{row[key]:.{digits}f} | {row[key] / rows[speed.PEER][key]:.2f}" for key, digits in COLUMNS)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def in_rounds(platform: str, layers: str, kind: str, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds, each of which compiles for every optimizer."""
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name in NAMES:
            command = [sys.executable, __file__, "--platform", platform, "--one", name, layers, kind]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[name].append(json.loads(out.splitlines()[-1]))
            print(platform, layers, kind, name, found[name][-1], flush=True)
    return {
        name: {"seconds": statistics.median(seconds for seconds, _ in runs), "lines": runs[0][1]}
        for name, runs in found.items()
    }


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", default="12,32", help="how many, separated by commas (default: 12,32)")
    p.add_argument("--platform", choices=CHIPS, default="cpu")
    p.add_argument("--kinds", default="separate", help="separate, scanned or both (default: separate)")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # other chips are only described
    if options.one:
        name, layers, kind = options.one
        print(json.dumps(compiled(name, options.platform, int(layers), kind)))
        return
    results = Results(options.out / "compilation.json", table)
    for layers in options.layers.split(","):
        for kind in options.kinds.split(","):
            rows = in_rounds(options.platform, layers, kind, options.rounds)
            results.add(f"{options.platform}, {layers} {kind} layers", rows, *PACKAGES[options.platform])
    print(results.text())


if __name__ == "__main__":
    main()
