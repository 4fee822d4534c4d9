"""Checks and measures everything on the device at hand: results, memory, time, training.

    python benchmarks/accelerator.py                      # a GPU or a TPU: 1B and 8B shapes
    python benchmarks/accelerator.py --small              # toy sizes, on a CPU in minutes
    python benchmarks/accelerator.py --text corpus.txt    # pretrain on your own text

The script has seven parts, and `--parts` selects some of them:

- `memory`: the compiled update's temporaries; the peak that the compiled program predicts beside the
  allocator's, where the device records one, each in a process of its own; the kernels that the program
  launches, as `kernels.py` counts them;
- `pretrain`: `examples/pretrain.py` with AdamW, Muon, GaLore-Muon and GUM, for one number of tokens;
- `check`: every optimizer's steps against its steps on the CPU, both in full float32;
- `speed`: the update beside optax's;
- `refresh`: every finder beside the exact SVD;
- `step`: whole training steps beside SGD's;
- `scaling`: what grows how.

The script writes `docs/results/accelerator.json`, a table and a figure of the losses. `benchmarks/choices.py`
measures what choices cost in loss, on any device.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import kernels
import memory
import numpy as np
import refresh
import scaling
import speed
import training_step
from results import RESULTS, Results

import gum_optax as go

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from optimizers import OPTIMIZERS, Settings, optimizer  # noqa: E402

# Relative to the largest change of a leaf. Both sides round every product in float32 and add in another
# order, which costs 3e-5 (measured with gradients that were rounded otherwise). A CPU also takes the Gram
# form of wide matrices, which is 1.3e-3 off.
TOLERANCE = 1e-2


class Shape(NamedTuple):
    """The matrices of a model."""

    width: int
    ff: int
    layers: int
    rank: int
    scanned: bool = True

    @property
    def optimizers(self) -> dict[str, Any]:
        return {name: speed.optimizers(self.rank)[name] for name in (*PEERS, *OURS)}

    @property
    def gradients(self) -> Any:
        return speed.gradients_of(self.width, self.ff, self.layers, scanned=self.scanned)


class Plan(NamedTuple):
    """The size of each part."""

    shapes: dict[str, Shape]
    rounds: int
    pretrain: tuple[str, ...]  # arguments of `examples/pretrain.py`
    step: tuple[str, int, int, int]  # model, rank, windows, tokens
    sweeps: dict[str, tuple[int, ...]]  # of `scaling.py`
    middle: dict[str, int]


# LLaMA-1B as in the GaLore paper, and four of the 32 layers of LLaMA-3-8B.
FULL = Plan(
    shapes={
        "1b": Shape(2048, 5461, 24, 512),
        "1b, 4 of 24 layers, separate": Shape(2048, 5461, 4, 512, scanned=False),
        "8b, 4 of 32 layers": Shape(4096, 14336, 4, 512),
    },
    rounds=10,
    pretrain=("--model", "60m", "--steps", "2000", "--batch", "64", "--seq", "256", "--period", "200"),
    step=("130m", 192, 64, 256),
    sweeps={"layers": (2, 4, 8), "rank": (64, 256, 512), "width": (512, 1024, 2048)},
    middle={"width": 1024, "layers": 4, "rank": 128},
)
SMALL = Plan(
    shapes={"toy": Shape(32, 48, 2, 4), "toy, separate": Shape(32, 48, 1, 4, scanned=False)},
    rounds=2,
    pretrain=("--model", "tiny", "--steps", "4", "--batch", "4", "--seq", "16", "--period", "2"),
    step=("tiny", 4, 2, 8),
    sweeps={"rank": (2,)},
    middle={"width": 16, "layers": 1, "rank": 2},
)
PEERS = (speed.PEER, "optax.adamw")
OURS = ("muon", "gum", "galore_muon", "sumo", "sinkgd")
TRAINED = ("adamw", "muon", "galore_muon", "gum")
PARTS = ("memory", "pretrain", "check", "speed", "refresh", "step", "scaling")
STEPPED = ("optax.sgd", "optax.adamw", "muon", "gum", "galore_muon", "sinkgd")


def check(steps: int = 5) -> dict[str, dict[str, Any]]:
    """For each optimizer, the largest difference from the CPU's steps, over the leaf's largest change."""
    gradients = [
        speed.gradients_of(32, 48, 2, scanned=False, seed=step) | {"embedding": jnp.ones((64, 32))}
        for step in range(steps)
    ]
    found = {}
    for name in OPTIMIZERS:
        settings = Settings(name, "tiny", steps, 1, 1, 0.01, 0.01, 8, 2, 0.25, 0.1, 0, "")

        def run(device: Any, settings: Settings = settings) -> Any:
            tx = optimizer(settings)
            with jax.default_device(device), jax.default_matmul_precision("highest"):
                grads = jax.device_put(gradients, device)
                params = start = jax.tree.map(lambda g: 0.1 * g, grads[0])
                state, step = jax.jit(tx.init)(params), jax.jit(kernels.step_of(tx))
                for g in grads:
                    params, state = step(params, state, g)
                return jax.device_get(jax.tree.map(jnp.subtract, params, start))

        here, there = run(jax.devices()[0]), run(jax.devices("cpu")[0])
        pairs = zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True)
        difference = float(np.max([abs(a - b).max() / abs(b).max() for a, b in pairs]))  # NaN stays NaN
        found[name] = {"difference": difference, "agrees": difference <= TOLERANCE}
    return found


def peak(name: str, shape: Shape) -> dict[str, int | None]:
    """The most bytes in one update and apply, the first of this process: as compiled, and of the allocator.

    Also the kernels of an ordinary step, as compiled.
    """
    tx, gradients = shape.optimizers[name](), shape.gradients
    params = jax.tree.map(jnp.zeros_like, gradients)
    state = jax.jit(tx.init)(params)
    program = jax.jit(kernels.step_of(tx), donate_argnums=(0, 1)).lower(params, state, gradients).compile()
    sizes = program.memory_analysis()
    assert sizes is not None
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    jax.block_until_ready(program(params, state, gradients))
    found = jax.devices()[0].memory_stats()
    return {
        "predicted peak": held + sizes.temp_size_in_bytes,
        "peak": None if found is None else found["peak_bytes_in_use"],
        "kernels": None
        if jax.default_backend() == "tpu"
        else kernels.launches(program.as_text() or "").kernels,
    }


def peaks(shape: Shape) -> dict[str, dict[str, Any]]:
    """The peaks of every optimizer, each in a process of its own. Too little memory is an outcome too."""
    found = {}
    for name in shape.optimizers:
        command = [sys.executable, __file__, "--peak", json.dumps([name, *shape])]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode == 0:
            found[name] = json.loads(child.stdout.splitlines()[-1])
        else:
            said = "failed: " + (child.stderr.splitlines() or ["said nothing"])[-1][:80]
            found[name] = {"predicted peak": None, "peak": said, "kernels": None}
        print(f"  {name}: {found[name]}", flush=True)
    return found


def lean(shape: Shape, peaks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """State, temporaries and peaks, in GiB, and kernels."""
    shapes = memory.layers(shape.width, shape.ff, shape.layers, scanned=shape.scanned)
    found = {}
    for name, make in shape.optimizers.items():
        report = go.memory_report(make(), shapes, compiled=True)
        assert report.temporaries is not None
        state = sum(report.state.values())
        sizes = {"state": state, "temporaries": report.temporaries, **peaks[name]}
        launched = sizes.pop("kernels")
        found[name] = {k: x / 2**30 if isinstance(x, int) else x for k, x in sizes.items()}
        found[name]["kernels"] = launched
        print(f"  {name}: {found[name]}", flush=True)
    return found


def finders(shape: Shape) -> dict[str, dict[str, Any]]:
    """Milliseconds of each finder on the largest matrix, and over the exact SVD's."""
    sides = min(shape.width, shape.ff), max(shape.width, shape.ff)
    ms = refresh.times(sides, shape.rank, 3)
    return {name: {"ms": x, "of the SVD's": x / ms["svd_subspace"]} for name, x in ms.items()}


def sweep(plan: Plan) -> dict[str, dict[str, Any]]:
    """The points of `scaling.py`, a row each."""
    found = scaling.measure(plan.sweeps, plan.middle, plan.rounds)
    return {
        f"{name}, {axis} {value}": point
        for axis, rows in found.items()
        for name, points in rows.items()
        for value, point in points.items()
    }


def pretrain(arguments: tuple[str, ...], text: Path | None, out: Path) -> dict[str, dict[str, Any]]:
    """The rows of `examples/pretrain.py`, its figure beside the results."""
    runs = out / "accelerator_runs"
    shutil.rmtree(runs, ignore_errors=True)
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), *arguments, "--out", str(runs)]
    command += ["--compare", ",".join(TRAINED)] + (["--text", str(text)] if text else [])
    subprocess.run(command, check=True)
    rows = json.loads((runs / "summary.json").read_text())
    shutil.copy(runs / "loss.png", out / "accelerator.png")
    shutil.rmtree(runs)
    return {row.pop("optimizer"): row for row in rows}


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The table of the benchmark that made the rows, or one column for each quantity."""
    heads = list(next(iter(rows.values())))
    if "amortised" in heads:
        return speed.table(rows)
    if "over_sgd" in heads:
        return training_step.table(rows)

    def shown(x: Any) -> str:
        return f"{x:.4g}" if isinstance(x, float) else "-" if x is None else str(x)

    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    return lines + [
        f"| `{name}` | {' | '.join(shown(row[head]) for head in heads)} |" for name, row in rows.items()
    ]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--small", action="store_true", help="toy sizes, to check that everything runs")
    p.add_argument("--parts", default=",".join(PARTS), help="default: all")
    p.add_argument("--text", type=Path, help="for `pretrain`; default: chitchat-dataset")
    p.add_argument("--peak", help=argparse.SUPPRESS)
    p.add_argument("--out", type=Path, default=RESULTS)
    return p


def main(argv: list[str] | None = None) -> None:
    p = parser()
    options = p.parse_args(argv)
    if options.peak:
        name, *shape = json.loads(options.peak)
        print(json.dumps(peak(name, Shape(*shape))))
        return
    plan, parts = SMALL if options.small else FULL, options.parts.split(",")
    if not set(parts) <= set(PARTS):
        p.error(f"--parts takes some of {','.join(PARTS)}; got {options.parts}.")
    options.out.mkdir(parents=True, exist_ok=True)
    # Child processes that need the device run first: this process then takes a TPU, or most of a GPU's
    # memory, for good.
    measured = {name: peaks(shape) for name, shape in plan.shapes.items() if "memory" in parts}
    trained = pretrain(plan.pretrain, options.text, options.out) if "pretrain" in parts else None
    device = jax.devices()[0].device_kind
    results = Results(options.out / "accelerator.json", table)
    if trained is not None:
        results.add(f"{device}, {' '.join(plan.pretrain)}", trained)
    if "check" in parts:
        results.add(f"{device}, against the CPU", check())
    for name, shape in plan.shapes.items():
        if "memory" in parts:
            results.add(f"{device}, {name}, GiB", lean(shape, measured[name]))
        if "speed" in parts:
            rows = speed.measure(shape.optimizers, shape.gradients, plan.rounds)
            results.add(f"{device}, {name}, an update", rows)
        if "refresh" in parts and shape.scanned:
            results.add(f"{device}, {name}, a subspace", finders(shape))
    if "step" in parts:
        model, rank, batch, length = plan.step
        rows = training_step.measure(model, list(STEPPED), rank, batch, length, plan.rounds)
        results.add(f"{device}, {model}, {batch} × {length} tokens, a training step", rows)
    if "scaling" in parts:
        results.add(f"{device}, varied from {plan.middle}", sweep(plan))
    print(results.text())


if __name__ == "__main__":
    main()
