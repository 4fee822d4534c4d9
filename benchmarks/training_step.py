"""Time and temporaries of whole training steps, forward and backward pass included, beside plain SGD.

    python benchmarks/training_step.py --model 60m

The models are the presets of `examples/pretrain.py`, and the tokens are random. Rounds go round-robin over
the optimizers in one process, and the script reports medians of steps without a refresh. It merges the
results into `docs/results/training_step.json` and writes the table of all results beside it.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import speed
from flax import nnx
from results import RESULTS, Results, round_robin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from llama import SIZES, Llama
from losses import next_token_loss


def optimizers(rank: int) -> dict[str, Callable[[], optax.GradientTransformation]]:
    """All optimizers; the first is the base of the comparison."""
    makers = speed.optimizers(rank)
    names = ("optax.adamw", "muon", "gum", "galore_muon", "sinkgd")
    return {"optax.sgd": lambda: optax.sgd(1e-3)} | {name: makers[name] for name in names}


class Step:
    """One model under one optimizer: a compiled, donated training step."""

    def __init__(self, model: str, tx: optax.GradientTransformation, batch: int, length: int):
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        graph, params = nnx.split(Llama(SIZES[model], dtype=dtype, rngs=nnx.Rngs(0)), nnx.Param)
        vocabulary = SIZES[model].vocabulary
        self.tokens = jax.random.randint(jax.random.key(0), (batch, length + 1), 0, vocabulary)

        def step(params, state, tokens):
            gradients = jax.grad(functools.partial(next_token_loss, graph))(params, tokens)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.state = params, jax.jit(tx.init)(params)
        self.step = jax.jit(step, donate_argnums=(0, 1)).lower(*self.state, self.tokens).compile()

    def temporaries(self) -> int:
        """Bytes that the compiled step holds besides parameters and state: gradients and activations too."""
        analysis = self.step.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    def seconds(self) -> float:
        start = time.perf_counter()
        self.state = jax.block_until_ready(self.step(*self.state, self.tokens))
        return time.perf_counter() - start


def measure(
    model: str, names: list[str], rank: int, batch: int, length: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds for a step, tokens in a second, time over that of SGD, and MiB of temporaries."""
    makers = optimizers(rank)
    steps = {name: Step(model, makers[name](), batch, length) for name in names}
    for name, step in steps.items():
        print(f"  {name}: first step {step.seconds():.1f} s", flush=True)
    seconds = round_robin({name: step.seconds for name, step in steps.items()}, rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    base = medians[names[0]]
    return {
        name: {
            "step": s,
            "tokens_per_second": batch * length / s,
            "over_sgd": s / base,
            "temporaries_mib": steps[name].temporaries() / 2**20,
        }
        for name, s in medians.items()
    }


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    lines = ["| optimizer | step ms | tokens/s | over SGD | temporaries MiB |", "|---" * 5 + "|"]
    for name, row in rows.items():
        times = f"{1e3 * row['step']:.0f} | {row['tokens_per_second']:.0f} | {row['over_sgd']:.3f}"
        lines.append(f"| `{name}` | {times} | {row['temporaries_mib']:.0f} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=SIZES, default="60m")
    p.add_argument(
        "--optimizers", default=",".join(optimizers(1)), help="default: all; the first is the base"
    )
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    results = Results(options.out / "training_step.json", table)
    rank = SIZES[options.model].rank
    setting = f"{jax.default_backend()}, {options.model}, {options.batch} × {options.seq} tokens, rank {rank}"
    print(setting, flush=True)
    sizes: tuple[Any, ...] = (rank, options.batch, options.seq, options.rounds)
    results.add(setting, measure(options.model, options.optimizers.split(","), *sizes))
    print(results.text())


if __name__ == "__main__":
    main()
