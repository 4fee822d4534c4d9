"""Reports from shapes alone how much memory well-known models need with each optimizer.

python -m gum_optax.report
python -m gum_optax.report --model qwen-2.5-7b --budget 40 --leaves
"""

import argparse
import bisect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._optimizers.galore import galore, galore_muon
from ._optimizers.gum import gum
from ._optimizers.muon import muon
from ._state.memory import MemoryReport, memory_report

GIB = 2**30
RANK_STEP = 64  # multiples of this rank fill the tiles of a matrix unit


class Architecture(NamedTuple):
    """A decoder, by the sizes in its published configuration."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int  # heads · head_dim is the width of queries and of the attention's output
    kv_heads: int
    head_dim: int
    vocabulary: int
    norms: int  # per layer
    biases: bool  # on queries, keys and values
    tied: bool  # the head is the embedding


MODELS = {
    # From the `config.json` of each release.
    "llama-3-8b": Architecture(32, 4096, 14336, 32, 8, 128, 128256, 2, biases=False, tied=False),
    "qwen-2.5-7b": Architecture(28, 3584, 18944, 28, 4, 128, 152064, 2, biases=True, tied=False),
    "gemma-2-9b": Architecture(42, 3584, 14336, 16, 8, 256, 256000, 4, biases=False, tied=True),
}


def shapes(a: Architecture, dtype: Any) -> dict[str, Any]:
    """The parameters of an architecture as `jax.ShapeDtypeStruct`s, with layers stacked as by `nn.scan`."""

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def linear(fan_in: int, fan_out: int, bias: bool = False) -> dict[str, Any]:
        kernel = {"kernel": leaf(a.layers, fan_in, fan_out)}
        return kernel | ({"bias": leaf(a.layers, fan_out)} if bias else {})

    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    layers = {
        "q_proj": linear(a.hidden, queries, a.biases),
        "k_proj": linear(a.hidden, keys, a.biases),
        "v_proj": linear(a.hidden, keys, a.biases),
        "o_proj": linear(queries, a.hidden),
        "gate_proj": linear(a.hidden, a.feed_forward),
        "up_proj": linear(a.hidden, a.feed_forward),
        "down_proj": linear(a.feed_forward, a.hidden),
    }
    layers |= {f"norm_{i}": {"scale": leaf(a.layers, a.hidden)} for i in range(a.norms)}
    params = {"embed": {"embedding": leaf(a.vocabulary, a.hidden)}, "layers": layers}
    params["norm"] = {"scale": leaf(a.hidden)}
    return params if a.tied else params | {"lm_head": {"kernel": leaf(a.hidden, a.vocabulary)}}


def optimizers(rank: int, fraction: float) -> dict[str, optax.GradientTransformation]:
    """AdamW for all leaves, and four optimizers of this library."""
    return {
        "adamw": optax.adamw(1.0),
        "muon": muon(1.0),
        "galore": galore(1.0, rank),
        "galore_muon": galore_muon(1.0, rank),
        "gum": gum(1.0, rank, full_rank_fraction=fraction),
    }


def largest_rank(
    params: dict[str, Any], budget: int, make: Callable[[int], optax.GradientTransformation]
) -> int | None:
    """The largest multiple of 64 below the width with which model and state fit `budget` bytes, or `None`.

    Memory grows with the rank until the rank reaches the side of a matrix, which is then no longer projected
    and needs less again. So the search bisects between one side and the next, from the largest down.
    """

    def is_too_much(rank: int) -> bool:
        return memory_report(make(rank), params).total > budget

    sides = {min(x.shape[-2:]) for x in jax.tree.leaves(params["layers"]) if x.ndim > 2}
    edges = [RANK_STEP * -(-side // RANK_STEP) for side in sorted({RANK_STEP, *sides}, reverse=True)]
    for above, lowest in itertools.pairwise(edges):
        ranks = range(lowest, above, RANK_STEP)
        fitting = bisect.bisect_left(ranks, True, key=is_too_much)
        if fitting:
            return ranks[fitting - 1]
    return None


def _row(name: str, report: MemoryReport) -> str:
    state = report.state
    kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in state.items() if size >= GIB // 100)
    return f"  {name:<12} {sum(state.values()) / GIB:8.2f} {report.total / GIB:9.2f}   {kinds}"


def main(arguments: list[str] | None = None) -> None:
    """Print the requested tables."""
    p = argparse.ArgumentParser(prog="python -m gum_optax.report", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--model", choices=MODELS, action="append", help="default: all")
    p.add_argument("--rank", type=int, default=128, help="default: %(default)s")
    p.add_argument("--full-rank-fraction", type=float, default=1 / 16, help="GUM's q (default: 1/16)")
    p.add_argument("--dtype", default="bfloat16", help="of parameters and gradients (default: %(default)s)")
    p.add_argument(
        "--budget", type=float, default=48, help="GiB, for the largest rank (default: %(default)s)"
    )
    p.add_argument("--leaves", action="store_true", help="also GUM's table, leaf by leaf")
    options = p.parse_args(arguments)
    for model in options.model or MODELS:
        params = shapes(MODELS[model], jnp.dtype(options.dtype))
        count = sum(x.size for x in jax.tree.leaves(params))
        weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)) / GIB
        print(
            f"{model}: {count / 1e9:.2f}B parameters, {weights:.2f} GiB as {options.dtype}, gradients as much"
        )
        print(f"  {'optimizer':<12} {'state':>8} {'in all':>9}   GiB; rank {options.rank}")
        for name, tx in optimizers(options.rank, options.full_rank_fraction).items():
            report = memory_report(tx, params)
            print(_row(name, report))
        for name in ("galore_muon", "gum"):
            rank = largest_rank(
                params,
                int(options.budget * GIB),
                lambda rank, name=name: optimizers(rank, options.full_rank_fraction)[name],
            )
            print(f"  {name}: largest rank within {options.budget:g} GiB: {rank or 'none'}")
        if options.leaves:
            print(memory_report(optimizers(options.rank, options.full_rank_fraction)["gum"], params))
        print()


if __name__ == "__main__":
    main()
