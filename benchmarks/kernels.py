"""Kernels that a compiled program launches on a GPU, counted in its optimized HLO.

    python benchmarks/kernels.py                        # update and apply, compiled for an H200
    python benchmarks/kernels.py --chip 24gb            # for a card of compute capability 8.9

A kernel is a fusion, a copy or a library call. A loop counts as often as it turns, and a conditional as its
cheapest branch, which is that of an ordinary step. Conditionals, and loops whose turns XLA does not know, are
counted apart: the GPU may wait for the host to read the predicate. No GPU is needed: `chips.py` says what is.
The layers, the donation and the settings are those of `memory.py`. The script merges the results into
`docs/results/kernels.json` and writes the table of all results beside it.
"""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hlo
import jax
import memory
import optax
from chips import CHIPS, PACKAGES, device_of, on_chip
from results import RESULTS, Results

# What launches nothing: names of buffers and of parts of them, and what an earlier instruction has started.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier",
    "partition-id", "replica-id", "add-dependency", "copy-done", "async-done", "async-update",
    "all-gather-done", "all-reduce-done", "collective-permute-done",
}  # fmt: skip
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")

NAMES = (
    "gum", "galore_muon", "sumo", "muon", "swan", "sinkgd", "optax.contrib.muon", "optax.adamw",
)  # fmt: skip


class Launches(NamedTuple):
    """What one run of a program starts."""

    kernels: int = 0
    conditionals: int = 0
    loops: int = 0  # of unknown length, each counted with one turn

    def plus(self, other: "Launches", times: int = 1) -> "Launches":
        return Launches(*(a + times * b for a, b in zip(self, other, strict=True)))


def launches(text: str) -> Launches:
    """Count what the entry computation of an optimized HLO module launches."""
    computations, entry = hlo.computations(text)
    counts: dict[str, Launches] = {}

    def of(computation: str) -> Launches:
        if computation not in counts:
            counts[computation] = Launches()
            for line in computations[computation]:
                if " = " in line:
                    counts[computation] = counts[computation].plus(_of_instruction(line, of))
        return counts[computation]

    return of(entry)


def _of_instruction(line: str, of: Callable[[str], Launches]) -> Launches:
    opcode = _opcode(line)
    if opcode in _FREE:
        return Launches()
    if opcode == "while":
        turns = hlo.turns(line)
        body = of(_only(_CALLED.findall(line)))
        return body.plus(Launches(loops=1)) if turns is None else Launches().plus(body, turns)
    if opcode == "conditional":
        found = _BRANCHES.findall(line)
        branches = [name.strip().lstrip("%") for names, one in found for name in (names or one).split(",")]
        return min(map(of, branches)).plus(Launches(conditionals=1))
    if opcode in ("call", "async-start"):
        return of(_only(_CALLED.findall(line)))
    return Launches(kernels=1)


def _opcode(line: str) -> str:
    """The operation of `name = type operation(operands), attributes`; a type may be a tuple."""
    rest = line.split(" = ", 1)[1]
    depth = 0
    for at, letter in enumerate(rest):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and not depth:
            return rest[at + 1 :].split("(", 1)[0]
    raise ValueError(f"no operation in {line!r}")


def _only(names: list[str]) -> str:
    (name,) = set(names)
    return name


def step_of(tx: Any) -> Callable[..., Any]:
    """Update and apply, with arguments in the order of the results, as in `memory_report`."""

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compiled(tx: Any, shapes: Any, device: Any) -> Any:
    """Update and apply, with parameters, state and gradients donated."""
    arguments = shapes, jax.eval_shape(tx.init, shapes), shapes
    return jax.jit(step_of(tx), donate_argnums=(0, 1, 2)).lower(*on_chip(arguments, device)).compile()


def measure(name: str, chip: str, width: str, kind: str) -> dict[str, float]:
    """One row of the table."""
    size, ff, rank = memory.SIZES[width]
    shapes = memory.layers(size, ff, 12, scanned=kind == "scanned")
    tx, device = memory.optimizers(rank)[name](), device_of(chip)
    start = time.perf_counter()
    program = compiled(tx, shapes, device)
    seconds = time.perf_counter() - start
    temporaries = memory.measure(tx, shapes, device)
    row = {"temporaries": round(temporaries, 4), "seconds": round(seconds, 1)}
    return row | launches(program.as_text())._asdict()


def table(rows: dict[str, Any]) -> list[str]:
    """One row for each optimizer."""
    lines = ["| optimizer | temporaries | kernels | conditionals | loops |", "|---" * 5 + "|"]
    for name, row in rows.items():
        cells = f"{row['temporaries']:.2f} | {row['kernels']} | {row['conditionals']} | {row['loops']}"
        lines.append(f"| `{name}` | {cells} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--chip", choices=CHIPS, default="h200")
    p.add_argument("--width", choices=memory.SIZES, default="512")
    p.add_argument("--optimizers", help="some of them, separated by commas; default: all that have a budget")
    p.add_argument("--kinds", default="scanned,separate", help="default: both")
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # the programs are only compiled
    results = Results(options.out / "kernels.json", table)
    for kind in options.kinds.split(","):
        setting = f"{options.chip} {options.width} × 12 {kind}"
        rows = results.rows(setting)
        for name in options.optimizers.split(",") if options.optimizers else NAMES:
            rows[name] = measure(name, options.chip, options.width, kind)
            print(setting, name, rows[name], flush=True)
            results.add(setting, rows, *PACKAGES[options.chip])


if __name__ == "__main__":
    main()
