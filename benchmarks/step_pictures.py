"""One picture of each optimizer: its step at a known gradient, and its loss on a small noisy regression.

    python benchmarks/step_pictures.py
    python benchmarks/step_pictures.py --optimizers gum,muon
    python benchmarks/step_pictures.py --pictures

The first command takes minutes. It writes the numbers to `docs/results/step_pictures.json` and the pictures
to `docs/optimizers`. `--optimizers` measures a few anew, and `--pictures` measures nothing: it draws from the
stored numbers alone. AdamW and Muon are measured with every choice, because the other pictures show them.

The step is the last of ten at one gradient, for a stack of four equal matrices 64 × 96 whose singular values
decay. The regression has four problems of that shape, one in each block:

    minimise  E ½|x W - y|²,   y = x W* + noise,   from 32 new examples a step,   for 100 steps

The rate falls linearly to zero. It is the best of the powers of two on a grid, by the loss at the end.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from results import RESULTS, versions

import gum_optax as go

from trainings import commit

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

LOW_RANK = {"rank": 8, "period": 10}
Maker = Callable[..., optax.GradientTransformation]
# The arguments are small, as the problem is; all others are the defaults.
OPTIMIZERS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "adamw": (optax.adamw, {"weight_decay": 0.0}),
    "muon": (go.muon, {}),
    "normuon": (go.normuon, {}),
    "galore": (go.galore, LOW_RANK),
    "galore_muon": (go.galore_muon, LOW_RANK),
    "gum": (go.gum, LOW_RANK | {"full_rank_fraction": 1 / 4}),
    "sumo": (go.sumo, LOW_RANK),
    "golore": (go.golore, LOW_RANK),
    "fira": (go.fira, LOW_RANK),
    "frugal": (go.frugal, LOW_RANK),
    "swan": (go.swan, {}),
    "sinkgd": (go.sinkgd, {}),
    "trion": (go.trion, {"rank": 8}),
    "dion": (go.dion, {"rank": 8}),
    "cosmos": (go.cosmos, {"rank": 8}),
    "scion": (go.scion, {}),
    "adalomo": (go.adalomo, {}),
    "hfac": (go.hfac, {}),
    "adamw_8bit": (go.adamw_8bit, {"weight_decay": 0.0}),
}
# What these do shows in the sizes of the neurons' steps; what the others do, in singular values.
BY_NEURON = ("normuon", "sinkgd", "adalomo", "hfac")
BLOCKS, ROWS, COLUMNS = 4, 64, 96
STEPS_AT_ONE_GRADIENT = 10
BATCH, NOISE = 32, 0.3
OWN, ADAMW, GRADIENT, SAMPLED = "#0072B2", "#D55E00", "#555555", "#009E73"  # Okabe and Ito's
LEGEND: dict[str, Any] = {"frameon": False, "columnspacing": 1.2, "handlelength": 1.7}
MUON = "#CC79A7"
# The step beside it: the sizes of AdamW's neurons say nothing at one gradient, where it is the sign.
BESIDE = {"singular_values": ("AdamW's step", "adamw", ADAMW), "neurons": ("Muon's step", "muon", MUON)}
LOSS_TICKS = (0.01, 0.03, 0.1, 0.3, 1)


class Sizes(NamedTuple):
    """How long the regression runs, and at which rates."""

    steps: int = 100
    rates: tuple[float, ...] = tuple(1e-5 * 2.0**i for i in range(24))


SIZES = Sizes()


def made(name: str, rate: Any) -> optax.GradientTransformation:
    make, keywords = OPTIMIZERS[name]
    return make(rate, **keywords)


def orthogonal(key: jax.Array, size: int) -> jax.Array:
    return jnp.linalg.qr(jax.random.normal(key, (size, size)))[0]


def known_gradient() -> jax.Array:
    """One matrix with singular values that decay, of which some neurons (columns) get less than others."""
    left, right = jax.random.split(jax.random.key(0))
    singular_values = 0.95 ** jnp.arange(ROWS)
    matrix = orthogonal(left, ROWS) * singular_values @ orthogonal(right, COLUMNS)[:ROWS]
    return matrix * 0.98 ** jnp.arange(COLUMNS)


def shape_of(matrix: Any) -> dict[str, list[float]]:
    """The singular values and the norms of the columns, the largest of each as one."""
    found = {
        "singular_values": np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False),
        "neurons": np.linalg.norm(np.asarray(matrix, np.float64), axis=0),
    }
    return {name: rounded(values / values.max()) for name, values in found.items()}


def rounded(values: Any) -> list[float]:
    return [float(f"{x:.4g}") for x in np.asarray(values).tolist()]


def sampled_block(state: Any) -> int | None:
    """The block that GUM runs at full rank; other optimizers have none."""

    def is_sampled(x):
        return isinstance(x, go.SampledState)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_sampled) if is_sampled(x)]
    return int(next(iter(found[0].index.values()))[0]) if found else None


def steps_at_one_gradient(name: str) -> dict[str, Any]:
    """The shape of the last step, for each kind of block."""
    gradient = {"kernel": jnp.broadcast_to(known_gradient(), (BLOCKS, ROWS, COLUMNS))}
    params = jax.tree.map(jnp.ones_like, gradient)
    tx = made(name, 1.0)
    update, state = jax.jit(tx.update), tx.init(params)
    step: Any = gradient
    for _ in range(STEPS_AT_ONE_GRADIENT):
        step, state = update(gradient, state, params)
    sampled = sampled_block(state)
    if sampled is None:
        return {"step": shape_of(step["kernel"][0])}
    low = next(i for i in range(BLOCKS) if i != sampled)
    blocks = {"step, a low-rank block": low, "step, the sampled block": sampled}
    return {label: shape_of(step["kernel"][block]) for label, block in blocks.items()}


def problem() -> tuple[jax.Array, jax.Array, jax.Array]:
    """The start, the solution, and the root of the inputs' covariance, whose eigenvalues are 1/i."""
    start, solution, basis = jax.random.split(jax.random.key(1), 3)
    shape = (BLOCKS, ROWS, COLUMNS)
    root = orthogonal(basis, ROWS) * (1 + jnp.arange(ROWS)) ** -0.5
    w, solved = (jax.random.normal(key, shape) / ROWS**0.5 for key in (start, solution))
    return w, solved, root


def losses_of(name: str, rate: Any, steps: int) -> jax.Array:
    """The expected loss without the noise, before each step and at the end, over the first."""
    start, solution, root = problem()
    tx = made(name, lambda step: rate * (1 - step / steps))

    def loss(w):
        return 0.5 * jnp.mean(jnp.sum((root.T @ (w - solution)) ** 2, axis=(1, 2)))

    def step(carry, key):
        params, state = carry
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (BLOCKS, BATCH, ROWS)) @ root.T
        error = x @ (params["kernel"] - solution)
        error = error - NOISE * jax.random.normal(keys[1], error.shape)
        updates, state = tx.update({"kernel": x.mT @ error / BATCH}, state, params)
        return (optax.apply_updates(params, updates), state), loss(params["kernel"])

    params: Any = {"kernel": start}
    keys = jax.random.split(jax.random.key(2), steps)
    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
    return jnp.append(losses, loss(params["kernel"])) / losses[0]


def measured(name: str, sizes: Sizes) -> dict[str, Any]:
    """The steps at the known gradient, and the losses at the best rate."""
    rates = jnp.asarray(sizes.rates)
    every = np.asarray(jax.jit(lambda r: jax.lax.map(lambda x: losses_of(name, x, sizes.steps), r))(rates))
    last = np.where(np.isfinite(every[:, -1]), every[:, -1], np.inf)
    best = int(last.argmin())
    if 0 < best < len(rates) - 1 or len(rates) < 3:
        return {
            "steps": steps_at_one_gradient(name),
            "rate": sizes.rates[best],
            "losses": rounded(every[best]),
            "loss_by_rate": {f"{rate:g}": rounded([x])[0] for rate, x in zip(sizes.rates, last, strict=True)},
        }
    raise SystemExit(f"the best rate of {name} is at the end of the grid, {sizes.rates[best]:g}.")


def measure(names: list[str], path: Path, sizes: Sizes) -> None:
    """Measure some optimizers, and store them beside those measured before."""
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"optimizers": {}}
    rows: dict[str, Any] = data["optimizers"]
    for name in names:
        rows[name] = measured(name, sizes)
        print(f"{name}: {rows[name]['losses'][-1]:.4g} at {rows[name]['rate']:g}")
    data |= {"commit": commit(), "versions": versions(), "gradient": shape_of(known_gradient())}
    ordered = {name: rows[name] for name in OPTIMIZERS if name in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data | {"optimizers": ordered}) + "\n")


def draw_steps(axes: Axes, name: str, data: dict[str, Any]) -> None:
    """What the step makes of the gradient."""
    kind = "neurons" if name in BY_NEURON else "singular_values"
    lines = {"gradient": (data["gradient"], GRADIENT, ":")}
    label, beside, colour = BESIDE[kind]
    lines[label] = (data["optimizers"][beside]["steps"]["step"], colour, "--")
    for (label, step), colour in zip(data["optimizers"][name]["steps"].items(), (OWN, SAMPLED), strict=False):
        lines[label] = (step, colour, "-")
    for label, (shape, colour, style) in lines.items():
        values = shape[kind]
        axes.plot(range(1, len(values) + 1), values, style, color=colour, label=label, linewidth=1.8)
    what = {"singular_values": "singular value", "neurons": "neuron (output)"}[kind]
    of = {"singular_values": "size over the largest", "neurons": "norm over the largest"}[kind]
    title = "What the step makes of a gradient"
    axes.set(
        xlabel=what, ylabel=of, title=title, ylim=(-0.04, 1.06), xlim=(0, len(data["gradient"][kind]) + 1)
    )


def draw_losses(axes: Axes, name: str, data: dict[str, Any]) -> None:
    """The losses beside AdamW's."""
    for shown, colour, style in (("adamw", ADAMW, "--"), (name, OWN, "-")):
        row = data["optimizers"][shown]
        label = f"{'AdamW' if shown == 'adamw' else shown}, rate {row['rate']:.2g}"
        axes.semilogy(row["losses"], style, color=colour, label=label, linewidth=1.8)
    axes.set(xlabel="step", ylabel="loss over the first", title="A noisy regression, best rates")
    axes.set_ylim(0.01, 2)
    axes.set_yticks(LOSS_TICKS, [f"{x:g}" for x in LOSS_TICKS])
    axes.set_yticks([], minor=True)


def draw(name: str, data: dict[str, Any], path: Path) -> None:
    """The picture of an optimizer: the same bytes for the same numbers."""
    style: Any = {"font.size": 10, "axes.titlesize": 11, "svg.fonttype": "none", "svg.hashsalt": "gum_optax"}
    with matplotlib.rc_context(style):
        figure, panels = plt.subplots(2, 1, figsize=(4.4, 6.2), layout="constrained")
        draw_steps(panels[0], name, data)
        draw_losses(panels[1], name, data)
        for panel in panels:
            panel.grid(alpha=0.3)
            panel.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, **LEGEND)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def main(argv: list[str] | None = None, sizes: Sizes = SIZES) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="default: all")
    p.add_argument("--pictures", action="store_true", help="draw only, from the stored numbers")
    p.add_argument("--out", type=Path, default=RESULTS, help="the folder of the numbers")
    p.add_argument(
        "--to", type=Path, default=RESULTS.parent / "optimizers", help="the folder of the pictures"
    )
    options = p.parse_args(argv)
    wanted = options.optimizers.split(",")
    if unknown := set(wanted) - set(OPTIMIZERS):
        p.error(f"unknown: {', '.join(sorted(unknown))}")
    path = options.out / "step_pictures.json"
    if not options.pictures:
        measure([name for name in OPTIMIZERS if name in {"adamw", "muon", *wanted}], path, sizes)
    data = json.loads(path.read_text())
    for name in data["optimizers"].keys() & set(wanted) - {"adamw"}:
        draw(name, data, options.to / f"{name}.svg")


if __name__ == "__main__":
    main()
