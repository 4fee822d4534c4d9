"""Reports from shapes alone how much memory well-known models need with each optimizer.

python -m gum_optax.report
python -m gum_optax.report --model qwen-2.5-7b --budget 40 --leaves
python -m gum_optax.report --chip 24gb --batch 1 --seq 1024     # whole training steps, and what fits
"""

import argparse
import bisect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._core.chips import CHIPS, Chip
from ._optimizers.galore import galore, galore_muon
from ._optimizers.gum import gum
from ._optimizers.muon import muon
from ._optimizers.sinkgd import sinkgd
from ._state import update_temporaries as temporaries
from ._state.memory import MemoryReport, memory_report
from ._state.step_memory import Activations, StepMemory, Update, bytes_of, layerwise_step, ordinary_step

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


def in_parts(params: dict[str, Any]) -> dict[str, Any]:
    """The shapes of an architecture as `layerwise_update` takes them."""
    head = {name: params[name] for name in ("norm", "lm_head") if name in params}
    return {"embed": params["embed"], "layers": params["layers"], "head": head}


def activations(
    a: Architecture, batch: int, seq: int, dtype: Any, logits_at_once: int | None = None
) -> Activations:
    """What the backward pass needs of the forward pass.

    A layer holds the inputs and the results of its products, and their gradients; of each score of the
    attention it holds the probability and a gradient, in float32. A loss that takes the tokens in chunks
    holds the head's gradient of one chunk beside the sum of those before.

    Args:
      a: the model.
      batch, seq: the tokens.
      dtype: of the activations.
      logits_at_once: about how many logits the loss takes at once; by default those of all tokens.
    """
    tokens, size = batch * seq, jnp.dtype(dtype).itemsize
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    numbers = tokens * (3 * a.hidden + 3 * queries + 3 * keys + 6 * a.feed_forward)
    scores = 2 * batch * a.heads * seq**2
    logits = 4 * tokens * a.vocabulary
    if logits_at_once is not None and logits_at_once < tokens * a.vocabulary:
        logits = 4 * logits_at_once + size * a.hidden * a.vocabulary
    return Activations(a.layers * tokens * a.hidden * size, numbers * size + 4 * scores, logits)


def optax_muon() -> optax.GradientTransformation:
    """`optax.contrib.muon` for the matrices of stacked layers, and AdamW for all other leaves."""

    def stacks(tree: Any) -> Any:
        return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(1, 2) if x.ndim == 3 else None, tree)

    return optax.contrib.muon(1.0, muon_weight_dimension_numbers=stacks)


def updates(rank: int, fraction: float, dtype: Any, chip: Chip) -> dict[str, Update]:
    """The optimizers of the table of a chip, with momenta in the dtype of the parameters."""
    name, fused = jnp.dtype(dtype).name, temporaries.of_fused
    stored = name if name == "bfloat16" else "float32"
    # A second moment by row and column for embedding, head and norms, in place of AdamW's two moments.
    factored = optax.chain(optax.scale_by_factored_rms(), optax.scale_by_learning_rate(1.0))

    def of_gum(others: Any, of_others: temporaries.Temporaries) -> Update:
        tx = gum(1.0, rank, full_rank_fraction=fraction, momentum_dtype=stored, others=others)
        return Update(tx, temporaries.of_gum(rank, fraction), of_others)

    low_rank = galore_muon(1.0, rank, momentum_dtype=stored)
    return {
        "optax.adamw": Update(optax.adamw(1.0), fused, fused),
        "optax.contrib.muon": Update(
            optax_muon(), temporaries.of_optax_muon(chip.computes_in_bfloat16), fused
        ),
        "muon": Update(muon(1.0, momentum_dtype=stored), temporaries.of_muon(chip.platform), fused),
        "galore_muon": Update(low_rank, temporaries.of_galore_muon(rank), fused),
        "gum": of_gum(None, fused),
        "gum, factored others": of_gum(factored, temporaries.of_factored(chip.platform)),
        "sinkgd": Update(sinkgd(1.0), fused, fused),
        "sinkgd, factored others": Update(
            sinkgd(1.0, others=factored), fused, temporaries.of_factored(chip.platform)
        ),
    }


def steps(
    a: Architecture, update: Update, needed: Activations, tokens: int, dtype: Any, platform: str
) -> dict[str, StepMemory]:
    """The memory of a training step with one optimizer, ordinary and layer by layer."""
    params, batch = in_parts(shapes(a, dtype)), 4 * tokens
    return {
        "ordinary": ordinary_step(update, params, batch, needed),
        "layer by layer": layerwise_step(update, params, batch, needed, platform),
    }


def fits(peak: int, chip: Chip) -> str:
    """Whether a step fits; `close` is within the error of the prediction, 10 %."""
    return "fits" if 1.1 * peak <= chip.usable else "close" if 0.9 * peak <= chip.usable else "no"


def _print_chip(model: str, chip: str, options: argparse.Namespace) -> None:
    """What fits on a chip, a row for each optimizer."""
    dtype, hardware = jnp.dtype(options.dtype), CHIPS[chip]
    tokens = options.batch * (options.seq + 1)
    needed = activations(MODELS[model], options.batch, options.seq, dtype, options.logits_at_once)
    print(
        f"{model} on {chip}: {hardware.memory / GIB:.1f} GiB, of which a step can plan for"
        f" {hardware.usable / GIB:.1f}; {options.dtype}, {options.batch} × {options.seq} tokens,"
        f" rank {options.rank}"
    )
    print(f"  {'optimizer':<24} {'held':>7} {'ordinary':>14}   {'layer by layer':>14}   GiB")
    for name, update in updates(options.rank, options.full_rank_fraction, dtype, hardware).items():
        found = steps(MODELS[model], update, needed, tokens, dtype, hardware.platform)
        cells = [f"{step.peak / GIB:8.2f} {fits(step.peak, hardware):>5}" for step in found.values()]
        print(f"  {name:<24} {found['ordinary'].held / GIB:7.2f} {'   '.join(cells)}")


def _print_state(model: str, options: argparse.Namespace) -> None:
    """Parameters, gradients and state, a row for each optimizer."""
    params = shapes(MODELS[model], jnp.dtype(options.dtype))
    count = sum(x.size for x in jax.tree.leaves(params))
    weights = bytes_of(params) / GIB
    print(f"{model}: {count / 1e9:.2f}B parameters, {weights:.2f} GiB as {options.dtype}, gradients as much")
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


def _at_least_one(text: str) -> int:
    """An integer above zero, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


_EPILOG = (
    "For a model of your own, print gum_optax.memory_report(tx, params); shapes suffice as params. In the"
    " tables, mu and nu are AdamW's moments, trace is the momentum, projectors are the subspaces, slots the"
    " full-size momenta of the blocks at full rank."
)


def main(arguments: list[str] | None = None) -> None:
    """Print the requested tables."""
    p = argparse.ArgumentParser(
        prog="python -m gum_optax.report", description=(__doc__ or "").split("\n")[0], epilog=_EPILOG
    )
    p.add_argument("--model", choices=MODELS, action="append", help="default: all")
    p.add_argument("--rank", type=_at_least_one, default=128, help="default: %(default)s")
    p.add_argument("--full-rank-fraction", type=float, default=1 / 16, help="GUM's q (default: 1/16)")
    p.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of parameters and gradients (default: %(default)s)",
    )
    p.add_argument(
        "--budget", type=float, default=48, help="GiB, for the largest rank (default: %(default)s)"
    )
    p.add_argument("--leaves", action="store_true", help="also GUM's table, leaf by leaf")
    p.add_argument("--chip", choices=CHIPS, help="what fits on this chip, in place of parameters and state")
    p.add_argument("--batch", type=_at_least_one, default=1, help="with --chip (default: %(default)s)")
    p.add_argument("--seq", type=_at_least_one, default=1024, help="with --chip (default: %(default)s)")
    p.add_argument(
        "--logits-at-once",
        type=_at_least_one,
        help="of a loss that takes tokens in chunks; default: all tokens",
    )
    options = p.parse_args(arguments)
    if not 0 <= options.full_rank_fraction <= 1:
        p.error(f"--full-rank-fraction must be between 0 and 1, got {options.full_rank_fraction}")
    for model in options.model or MODELS:
        if options.chip:
            _print_chip(model, options.chip, options)
        else:
            _print_state(model, options)
        print()


if __name__ == "__main__":
    main()
