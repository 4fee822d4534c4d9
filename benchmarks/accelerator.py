"""Everything on whatever device is here: right, lean, fast, and training.

    python benchmarks/accelerator.py                      # a GPU or a TPU: 1B and 8B shapes
    python benchmarks/accelerator.py --small              # the same at toy size, on a CPU in minutes
    python benchmarks/accelerator.py --text corpus.txt    # pretrain on your own text

Four parts, each of which can be had by itself with `--parts`:

- `check`: every optimizer's steps against the same on the CPU, both in full float32;
- `memory`: the compiled update's temporaries, and the allocator's peak where it keeps one (a process each);
- `speed`: the update beside optax's;
- `pretrain`: `examples/pretrain.py` with AdamW, Muon, GaLore-Muon and GUM for one budget of tokens.

Results go to `docs/results/accelerator.json`, with a table and the losses' figure beside it.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import memory
import optax
import speed
from results import RESULTS, Results

import gum_optax as go

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from optimizers import OPTIMIZERS, Settings, optimizer  # noqa: E402

# Of the largest entry of the parameters. Both sides round every product in float32, in another order, and
# Newton-Schulz raises what is rounded off small singular values by up to 500.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Plan:
    """How large each part is."""

    shapes: dict[str, tuple[int, int, int, int]]  # name: width, feed-forward, layers, rank
    rounds: int
    pretrain: tuple[str, ...]  # arguments of `examples/pretrain.py`


# LLaMA-1B as in the GaLore paper, and four of the 32 layers of LLaMA-3-8B.
FULL = Plan(
    shapes={"1b": (2048, 5461, 24, 512), "8b, 4 of 32 layers": (4096, 14336, 4, 512)},
    rounds=10,
    pretrain=("--model", "60m", "--steps", "5000", "--batch", "64", "--seq", "256", "--period", "200"),
)
SMALL = Plan(
    shapes={"toy": (32, 48, 2, 4)},
    rounds=2,
    pretrain=("--model", "tiny", "--steps", "4", "--batch", "4", "--seq", "16", "--period", "2"),
)
PEERS = ("optax.contrib.muon", "optax.adamw")
OURS = ("muon", "gum", "galore_muon", "sumo", "sinkgd")
TRAINED = ("adamw", "muon", "galore_muon", "gum")


def check(steps: int = 5) -> dict[str, dict[str, Any]]:
    """For each optimizer the largest difference of parameters from the CPU's, over their largest entry."""
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
                params = jax.tree.map(lambda g: 0.1 * g, grads[0])
                state, update = tx.init(params), jax.jit(tx.update)
                for g in grads:
                    step, state = update(g, state, params)
                    params = optax.apply_updates(params, step)
                return jax.device_get(params)

        here, there = run(jax.devices()[0]), run(jax.devices("cpu")[0])
        scale = max(float(abs(x).max()) for x in jax.tree.leaves(there))
        difference = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), here, there)))
        found[name] = {"difference": difference / scale, "agrees": difference <= TOLERANCE * scale}
    return found


def allocator_peak(name: str, width: int, ff: int, layers: int, rank: int) -> int | None:
    """Bytes that the allocator held at most in one update and apply, this process's first."""
    tx = speed.optimizers(rank)[name]()
    gradients = speed.gradients_of(width, ff, layers, scanned=True)
    params = jax.tree.map(jnp.zeros_like, gradients)
    state = jax.jit(tx.init)(params)

    def step(params, state, gradients):  # in the order of the results, as `memory_report` has it
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    jax.block_until_ready(jax.jit(step, donate_argnums=(0, 1))(params, state, gradients))
    found = jax.devices()[0].memory_stats()
    return None if found is None else found["peak_bytes_in_use"]


def lean(shape: tuple[int, int, int, int]) -> dict[str, dict[str, Any]]:
    """State, temporaries and the allocator's peak, in GiB."""
    width, ff, layers, rank = shape
    found = {}
    for name in (*OURS, *PEERS):
        tx = speed.optimizers(rank)[name]()
        report = go.memory_report(tx, memory.layers(width, ff, layers, scanned=True), compiled=True)
        assert report.temporaries is not None
        command = [sys.executable, __file__, "--peak", name, *map(str, shape)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        # Too little memory is an outcome too.
        peak = json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else "failed"
        sizes = {"state": sum(report.state.values()), "temporaries": report.temporaries, "peak": peak}
        found[name] = {k: x / 2**30 if isinstance(x, int) else x for k, x in sizes.items()}
        print(f"  {name}: {found[name]}", flush=True)
    return found


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
    """A column a quantity, whatever they are."""
    heads = list(next(iter(rows.values())))

    def shown(x: Any) -> str:
        return f"{x:.4g}" if isinstance(x, float) else "-" if x is None else str(x)

    lines = [f"| optimizer | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    return lines + [
        f"| `{name}` | {' | '.join(shown(row[head]) for head in heads)} |" for name, row in rows.items()
    ]


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--small", action="store_true", help="toy sizes, to see that everything runs")
    p.add_argument("--parts", default="check,memory,speed,pretrain")
    p.add_argument("--text", type=Path, help="for `pretrain`; default: chitchat-dataset")
    p.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    if options.peak:
        name, *shape = options.peak
        print(json.dumps(allocator_peak(name, *map(int, shape))))
        return
    plan, parts = SMALL if options.small else FULL, options.parts.split(",")
    device = jax.devices()[0].device_kind
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "accelerator.json", table)
    if "check" in parts:
        results.add(f"{device}, against the CPU", check())
    for name, shape in plan.shapes.items():
        width, ff, layers, rank = shape
        if "memory" in parts:
            results.add(f"{device}, {name}, GiB", lean(shape))
        if "speed" in parts:
            gradients = speed.gradients_of(width, ff, layers, scanned=True)
            makers = {name: speed.optimizers(rank)[name] for name in (*PEERS, *OURS)}
            rows = speed.measure(makers, gradients, plan.rounds)
            results.add(f"{device}, {name}, seconds", rows)
    if "pretrain" in parts:
        results.add(
            f"{device}, {' '.join(plan.pretrain)}", pretrain(plan.pretrain, options.text, options.out)
        )
    print(results.text())


if __name__ == "__main__":
    main()
