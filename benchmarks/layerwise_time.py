"""Seconds of a training step layer by layer beside the ordinary step, and seconds to compile each.

    python benchmarks/layerwise_time.py                  # the shapes of LLaMA-60M, 2048 tokens
    python benchmarks/layerwise_time.py --keep-every 4

The ordinary step recomputes each layer in its backward pass, as the step layer by layer does. Both run in one
process, in turns, and the script reports medians of steps without a refresh, and the median of the ratios of
steps that follow each other; so it does of compilations. It merges the results into
`docs/results/layerwise_time.json` and writes the table of all results beside it.
"""

import argparse
import functools
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import layerwise
from results import RESULTS, Results, round_robin

from gum_optax import report

# The 60m of GaLore (arXiv 2403.03507, Table 5).
MODELS = {
    "60m": report.Architecture(8, 512, 1376, 8, 8, 64, 32000, 2, biases=False, tied=False),
    "tiny": report.Architecture(2, 32, 64, 2, 2, 16, 512, 2, biases=False, tied=False),
}


COMPILATIONS = 5


class Run:
    """One donated step and what it moves."""

    def __init__(self, step: Any, tx: Any, params: Any, tokens: Any):
        self.tokens = tokens
        self.state = jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)
        self.jitted = jax.jit(step, donate_argnums=(0, 1))

    def compile(self) -> float:
        """The seconds of a compilation, tracing included."""
        jax.clear_caches()
        start = time.perf_counter()
        self.step = self.jitted.lower(*self.state, self.tokens).compile()
        return time.perf_counter() - start

    def take(self) -> float:
        """The seconds of one step."""
        start = time.perf_counter()
        *state, loss = self.step(*self.state, self.tokens)
        self.state = tuple(jax.block_until_ready(state))
        assert jnp.isfinite(loss)
        return time.perf_counter() - start


def initial(model: report.Architecture) -> Any:
    """Random parameters; norms are one."""

    def of(path: Any, x: Any) -> Any:
        if path[-1].key == "scale":
            return jnp.ones(x.shape)
        key = jax.random.key(zlib.crc32(jax.tree_util.keystr(path).encode()))
        return jax.random.normal(key, x.shape) * x.shape[-2] ** -0.5

    return jax.tree_util.tree_map_with_path(of, layerwise.shapes_of(model, jnp.float32))


def measure(model: report.Architecture, name: str, batch: int, seq: int, keep_every: int, rounds: int) -> Any:
    """Medians of both steps and of their compilations, and of the ratios of two that follow each other."""
    tx = layerwise.updates(model.hidden // 4, jnp.float32)[name].tx
    tokens = jax.random.randint(jax.random.key(1), (batch, seq + 1), 0, model.vocabulary)
    params = initial(model)
    by_layer = functools.partial(layerwise.layer_by_layer, keep_every=keep_every)
    makers = {"ordinary": layerwise.ordinary, "layer by layer": by_layer}
    runs = {kind: Run(make(tx, model), tx, params, tokens) for kind, make in makers.items()}
    compilations = medians(round_robin({kind: run.compile for kind, run in runs.items()}, COMPILATIONS))
    for run in runs.values():
        run.take()  # the refresh
    row = medians(round_robin({kind: run.take for kind, run in runs.items()}, rounds))
    return row | {f"compile, {kind}": value for kind, value in compilations.items()}


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median seconds of two kinds, and the median of the second's over the first's."""
    ratios = [a / b for b, a in zip(*seconds.values(), strict=True)]
    return {kind: statistics.median(times) for kind, times in (seconds | {"ratio": ratios}).items()}


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        "| optimizer | ordinary s | layer by layer s | ratio"
        " | compile: ordinary s | layer by layer s | ratio |",
        "|---" * 7 + "|",
    ]
    for name, row in rows.items():
        times = f"{row['ordinary']:.2f} | {row['layer by layer']:.2f} | {row['ratio']:.3f}"
        compilation = f"{row['compile, ordinary']:.1f} | {row['compile, layer by layer']:.1f}"
        lines.append(f"| `{name}` | {times} | {compilation} | {row['compile, ratio']:.2f} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=MODELS, default="60m")
    p.add_argument("--optimizers", default="optax.adamw;gum;galore_muon", help="by ;")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--keep-every", type=int, default=1)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    results = Results(options.out / "layerwise_time.json", table)
    model = MODELS[options.model]
    setting = f"{jax.default_backend()}, {options.model}, {options.batch} × {options.seq} tokens"
    setting += f", inputs of every {options.keep_every} layers" if options.keep_every > 1 else ""
    rows = results.rows(setting)
    for name in options.optimizers.split(";"):
        rows[name] = measure(model, name, options.batch, options.seq, options.keep_every, options.rounds)
        print(setting, name, rows[name], flush=True)
        results.add(setting, rows)
    print(results.text())


if __name__ == "__main__":
    main()
