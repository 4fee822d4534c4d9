"""Temporaries of a compiled update and apply, over the bytes of the gradients.

    python benchmarks/memory.py                     # CPU
    python benchmarks/memory.py --platform tpu      # TPU v5e, ahead of time: chips.py says what that needs
    python benchmarks/memory.py --whole-steps       # forward, backward, update and apply, on any platform

The figures are exact: they come from XLA's buffer assignment, for twelve decoder layers, as separate and as
scanned leaves. Parameters and state are donated. The compiled step makes the gradients, as in training; with
`--keep-gradients` they are arguments, and XLA may not write over them. The script merges the results into
`docs/results/memory.json` and writes the table of all results beside it.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from chips import CHIPS, PACKAGES, device_of, on_chip
from results import RESULTS, versions

import gum_optax as go

# (width, feed-forward, rank) of the tests' small model, of LLaMA-350M and of LLaMA-1B; the rank is an eighth
# of the width. XLA gives every scalar 16 KiB on a TPU, which is most of a TPU's figures at width 512.
SIZES = {"512": (512, 1376, 64), "1024": (1024, 2736, 128), "2048": (2048, 5461, 256)}
# (width, layers, tokens) of whole training steps; the rank is an eighth of the width there too.
WHOLE_STEPS = ((512, 8, 64), (256, 12, 64), (2048, 8, 64), (2048, 8, 2048))


def layers(width: int, ff: int, count: int, *, scanned: bool) -> dict[str, Any]:
    """The matrices of decoder layers, as shapes."""
    square = dict.fromkeys(("q", "k", "v", "o"), (width, width))
    one = square | {"up": (width, ff), "gate": (width, ff), "down": (ff, width)}

    def leaf(*shape: int) -> dict[str, Any]:
        return {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}

    if scanned:
        return {name: leaf(count, *shape) for name, shape in one.items()}
    return {str(i): {name: leaf(*shape) for name, shape in one.items()} for i in range(count)}


def optax_muon() -> Any:
    """`optax.contrib.muon` with leaves of three axes as stacks; by default it gives them to AdamW."""

    def stacks(tree: Any) -> Any:
        return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), tree)

    return optax.contrib.muon(1e-3, muon_weight_dimension_numbers=stacks)


def optimizers(rank: int, momentum_dtype: str = "float32") -> dict[str, Callable[[], Any]]:
    """The library's optimizers, and the peers; `momentum_dtype` is for those that have one."""
    stored: dict[str, Any] = {"momentum_dtype": momentum_dtype}
    return {
        "galore_muon": lambda: go.galore_muon(1e-3, rank, **stored),
        "gum": lambda: go.gum(1e-3, rank, full_rank_fraction=1 / 12, **stored),
        "sumo": lambda: go.sumo(1e-3, rank, orthogonalizer=go.polar_by_products, **stored),
        "sinkgd": lambda: go.sinkgd(1e-3),
        "muon": lambda: go.muon(1e-3, **stored),
        "swan": lambda: go.swan(1e-3),
        "scion": lambda: go.scion(1e-3),
        "galore": lambda: go.galore(1e-3, rank),
        "fira": lambda: go.fira(1e-3, rank),
        "frugal": lambda: go.frugal(1e-3, rank),
        "trion": lambda: go.trion(1e-3, rank),
        "dion": lambda: go.dion(1e-3, rank),
        "cosmos": lambda: go.cosmos(1e-3, rank),
        "optax.contrib.muon": optax_muon,
        "optax.contrib.galore": lambda: optax.contrib.galore(1e-3, rank),
        "optax.adamw": lambda: optax.adamw(1e-3),
    }


def measure(tx: Any, shapes: Any, device: Any, *, keep_gradients: bool = False) -> float:
    """Bytes of temporaries over bytes of gradients."""
    report = go.memory_report(tx, shapes, compiled=device, keep_gradients=keep_gradients)
    assert report.temporaries is not None
    return report.temporaries / report.gradients


def whole_step(tx: Any, width: int, layers: int, tokens: int = 64, device: Any = True) -> float:
    """Temporaries of a whole training step over the gradients' bytes: forward, backward, update and apply.

    The model is `x = tanh(x @ w)`, and each layer is a leaf of its own. Parameters and state are donated. The
    temporaries include activations and gradients.
    """

    def loss(params: Any, x: Any) -> Any:
        for name in sorted(params):
            x = jnp.tanh(x @ params[name]["kernel"])
        return jnp.mean(x * x)

    def step(params: Any, state: Any, x: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    one = {"kernel": jax.ShapeDtypeStruct((width, width), jnp.float32)}
    params = {f"layer_{i:02d}": one for i in range(layers)}
    batch = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    arguments = params, jax.eval_shape(tx.init, params), batch
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*on_chip(arguments, device)).compile()
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes / (4 * layers * width**2)


def measure_whole_steps(platform: str, names: list[str], data: dict[str, Any]) -> None:
    """Add the whole steps of each optimizer to what was measured before."""
    device = device_of(platform)
    for width, layers, tokens in WHOLE_STEPS:
        setting = f"{platform} {width} × {layers}" + f", {tokens} tokens" * (tokens != 64)
        data["versions"]["whole step, " + setting] = versions(*PACKAGES.get(platform, []))
        for name in names:
            share = whole_step(optimizers(width // 8)[name](), width, layers, tokens, device)
            data["whole_steps"].setdefault(name, {})[setting] = round(share, 4)
            print(f"whole step, {setting}  {name}  {share:.3f}", flush=True)


def table(found: dict[str, Any]) -> str:
    """One row for each optimizer, one column for each setting."""
    settings = list(dict.fromkeys(setting for row in found.values() for setting in row))
    lines = ["| optimizer | " + " | ".join(settings) + " |", "|---" * (len(settings) + 1) + "|"]
    for name, row in found.items():
        cells = [f"{row[s]:.2f}" if s in row else "" for s in settings]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--platform", choices=CHIPS, default="cpu")
    p.add_argument("--width", choices=SIZES, default="512")
    p.add_argument("--layers", type=int, default=12)
    p.add_argument("--optimizers", help="some of them, separated by commas; default: all")
    p.add_argument("--kinds", default="separate,scanned", help="default: both")
    p.add_argument(
        "--keep-gradients", action="store_true", help="make them arguments of the compiled function"
    )
    p.add_argument("--whole-steps", action="store_true", help="gradients and activations included")
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    # Programs for other chips are only compiled; everything else runs on the CPU.
    jax.config.update("jax_platforms", "cpu")
    makers = optimizers(SIZES[options.width][2])
    names = options.optimizers.split(",") if options.optimizers else list(makers)
    path = options.out / "memory.json"
    data = {"whole_steps": {}, "temporaries": {}, "versions": {}}
    if path.exists():
        data |= json.loads(path.read_text())
    if options.whole_steps:
        measure_whole_steps(options.platform, names, data)
    else:
        measure_updates(options, makers, names, data)
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    (options.out / "memory.md").write_text(table(data["temporaries"]))
    (options.out / "whole_steps.md").write_text(table(data["whole_steps"]))


def measure_updates(options: Any, makers: dict[str, Any], names: list[str], data: dict[str, Any]) -> None:
    """Add the updates of each optimizer to what was measured before."""
    width, ff, _ = SIZES[options.width]
    device = device_of(options.platform)
    for kind in options.kinds.split(","):
        scanned = kind == "scanned"
        kept = ", gradients kept" * options.keep_gradients
        setting = f"{options.platform} {width} × {options.layers} {kind}{kept}"
        data["versions"][setting] = versions(*PACKAGES.get(options.platform, []))
        for name in names:
            if scanned and name == "optax.contrib.galore":
                continue  # it has no batch axes and raises on stacked leaves
            share = measure(
                makers[name](),
                layers(width, ff, options.layers, scanned=scanned),
                device,
                keep_gradients=options.keep_gradients,
            )
            data["temporaries"].setdefault(name, {})[setting] = round(share, 4)
            print(f"{setting}  {name}  {share:.3f}", flush=True)


if __name__ == "__main__":
    main()
