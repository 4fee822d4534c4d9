"""Time of one compiled update, for this library and its peers in one process.

    python benchmarks/speed.py --model 130m --rank 128

The gradients are random, for the matrices of a LLaMA (Lialin et al.'s sizes, as in the GaLore paper); the
state is donated. Rounds go round-robin over the optimizers, so that a busy machine slows all of them, and the
script reports medians. It times a refresh by itself and spreads it over the period of 200. It times the very
first step by itself, too, after an untimed run, because the first run of a process also waits for the
machine's memory. The script merges the results into `docs/results/speed.json` and writes the table and the
figure of all results beside it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import memory
import optax
from results import RESULTS, Results

import gum_optax as go

# (width, feed-forward, layers)
MODELS = {"tiny": (32, 48, 2), "60m": (512, 1376, 8), "130m": (768, 2048, 12), "350m": (1024, 2736, 24)}
PERIOD = 200
FRACTION = 1 / 16
PEER = "optax.contrib.muon"  # the denominator of all ratios


def batched_muon(learning_rate: float) -> optax.GradientTransformation:
    """A plain Muon: momentum, then Newton-Schulz of all matrices of one shape as a single stack."""

    def orthogonalized(updates, params):
        del params
        leaves, treedef = jax.tree.flatten(updates)
        groups: dict[Any, list[int]] = {}
        for place, leaf in enumerate(leaves):
            groups.setdefault(leaf.shape[-2:], []).append(place)
        for shape, places in groups.items():
            stack = jnp.concatenate([leaves[i].reshape(-1, *shape) for i in places])
            parts = jnp.split(go.newton_schulz(stack), len(places))
            for place, part in zip(places, parts, strict=True):
                leaves[place] = part.reshape(leaves[place].shape)
        return treedef.unflatten(leaves)

    return optax.chain(optax.trace(0.95), optax.stateless(orthogonalized), optax.scale(-learning_rate))


def optimizers(rank: int) -> dict[str, Callable[[], optax.GradientTransformation]]:
    """All optimizers, the peers first."""
    return {
        PEER: memory.optax_muon,
        "optax.contrib.galore": lambda: optax.contrib.galore(1e-3, rank, PERIOD),
        "optax.adamw": lambda: optax.adamw(1e-3),
        "batched Muon": lambda: batched_muon(1e-3),
        "muon": lambda: go.muon(1e-3),
        "gum": lambda: go.gum(1e-3, rank, PERIOD, FRACTION),
        "galore_muon": lambda: go.galore_muon(1e-3, rank, PERIOD),
        "gum (plain form)": lambda: go.gum(1e-3, rank, PERIOD, FRACTION, orthogonalizer=go.newton_schulz),
        "galore_muon (plain form)": lambda: go.galore_muon(
            1e-3, rank, PERIOD, orthogonalizer=go.newton_schulz
        ),
        "sumo": lambda: go.sumo(1e-3, rank, PERIOD),
        "sinkgd": lambda: go.sinkgd(1e-3),
    }


class Timed:
    """An optimizer's compiled update, with its state."""

    def __init__(self, tx: optax.GradientTransformation, gradients: Any):
        self.gradients = gradients
        self.init = jax.jit(tx.init)
        start = time.perf_counter()
        state = jax.eval_shape(tx.init, gradients)
        lowered = jax.jit(tx.update, donate_argnums=1).lower(gradients, state, gradients)
        self.update = lowered.compile()
        paths = (jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
        self.refreshes = any("projector" in path for path in paths)
        self.compile_seconds = time.perf_counter() - start
        self.state: Any = None

    def first(self) -> float:
        """Seconds of the first step, which finds every subspace without a previous one."""
        self.state = None  # frees the old state before the new one is made
        self.state = jax.block_until_ready(self.init(self.gradients))
        return self.next()

    def refresh(self) -> float:
        """Seconds of the first step of a later period."""

        def counted(path, x):  # each counter gets its own array, because the state is donated
            return jnp.full(x.shape, PERIOD, x.dtype) if getattr(path[-1], "name", "") == "count" else x

        self.state = jax.tree_util.tree_map_with_path(counted, self.state)
        return self.next()

    def next(self) -> float:
        start = time.perf_counter()
        updates, self.state = jax.block_until_ready(self.update(self.gradients, self.state, self.gradients))
        elapsed = time.perf_counter() - start
        del updates
        return elapsed


def gradients_of(width: int, ff: int, layers: int, *, scanned: bool, seed: int = 0) -> Any:
    shapes, treedef = jax.tree.flatten(memory.layers(width, ff, layers, scanned=scanned))
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return treedef.unflatten(
        [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, shapes, strict=True)]
    )


Makers = dict[str, Callable[[], optax.GradientTransformation]]


def measure(makers: Makers, gradients: Any, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of an ordinary step, the first, a refresh, the amortised step, and the compilation."""
    timed = {}
    for name, make in makers.items():
        timed[name] = Timed(make(), gradients)
        timed[name].first()
        print(f"  {name}: compiled in {timed[name].compile_seconds:.1f} s", flush=True)
    steps, firsts, refreshes = ({name: [] for name in makers} for _ in range(3))
    for _ in range(rounds):
        for name in makers:
            if timed[name].refreshes:
                firsts[name].append(timed[name].first())
                refreshes[name].append(timed[name].refresh())
            steps[name].append(timed[name].next())
    found = {}
    for name in makers:
        step, first, refresh = (
            statistics.median(times[name] or steps[name]) for times in (steps, firsts, refreshes)
        )
        found[name] = {
            "first": first,
            "step": step,
            "refresh": refresh,
            "amortised": step + max(refresh - step, 0.0) / PERIOD,
            "compile": timed[name].compile_seconds,
        }
    return found


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Milliseconds and ratios to the peer."""
    base = rows[PEER]["amortised"]
    kinds = ("step", "first", "refresh", "amortised")
    heads = ["optimizer", *(f"{kind} ms" for kind in kinds), "of optax's Muon", "compile s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        times = " | ".join(f"{1e3 * row[kind]:.0f}" for kind in kinds)
        lines.append(f"| `{name}` | {times} | {row['amortised'] / base:.3f} | {row['compile']:.0f} |")
    return lines


def plot(settings: dict[str, Any], path: Path) -> None:
    """Amortised time over the peer's, one colour for each setting."""
    names = list(dict.fromkeys(name for found in settings.values() for name in found["rows"]))[::-1]
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    thickness = 0.8 / len(settings)
    for i, (setting, found) in enumerate(settings.items()):
        rows = found["rows"]
        base = rows[PEER]["amortised"]
        places = [place + thickness * i for place, name in enumerate(names) if name in rows]
        ratios = [rows[name]["amortised"] / base for name in names if name in rows]
        axes.barh(places, ratios, height=thickness, label=setting)
    axes.set_yticks([place + 0.4 for place in range(len(names))], names)
    axes.set(xscale="log", xlabel=f"time of an update, of {PEER}'s")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parser(doc: str | None, *, model: str, rounds: int) -> argparse.ArgumentParser:
    """The options of a script that times updates."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=MODELS, default=model)
    p.add_argument("--rank", type=int, default=128)
    p.add_argument("--kinds", default="separate,scanned", help="default: both")
    p.add_argument("--rounds", type=int, default=rounds)
    p.add_argument("--out", type=Path, default=RESULTS)
    return p


def settings(options: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """For each kind of layers, yields the kind, the name of the setting and the gradients."""
    for kind in options.kinds.split(","):
        setting = f"{jax.default_backend()}, {options.model}, {kind} layers, rank {options.rank}"
        print(setting, flush=True)
        yield kind, setting, gradients_of(*MODELS[options.model], scanned=kind == "scanned")


def main(argv: list[str] | None = None) -> None:
    p = parser(__doc__, model="130m", rounds=5)
    p.add_argument("--optimizers", help="some of them, separated by commas; default: all")
    options = p.parse_args(argv)
    names = options.optimizers.split(",") if options.optimizers else list(optimizers(options.rank))
    if PEER not in names or not set(names) <= set(optimizers(options.rank)):
        p.error(f"--optimizers takes {PEER} and some of {', '.join(optimizers(options.rank))}; got {names}.")
    results = Results(options.out / "speed.json", table)
    for kind, setting, gradients in settings(options):
        makers = {name: optimizers(options.rank)[name] for name in names}
        if kind == "scanned":
            makers.pop("optax.contrib.galore", None)  # it raises on stacked leaves
        results.add(setting, measure(makers, gradients, options.rounds))
        plot(results.data["settings"], options.out / "speed.png")
    print(results.text())


if __name__ == "__main__":
    main()
