"""What projecting before the reduce saves: bytes sent, accumulated and held, from compiled programs.

    python benchmarks/projected.py --model 60m

A program computes the mean gradient over microbatches and eight forced host devices, data parallel, and an
update. `plain` accumulates and averages whole gradients, `projected` is `projected_update`. The script
compiles the programs and runs none. The results are `projected.json` and `projected.md` in `docs/results`.
"""

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from collectives import collectives, total
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from results import RESULTS, Results

import gum_optax as go

try:
    from jax.extend.core import jaxprs_in_params
except ImportError:  # jax 0.9
    from jax.core import jaxprs_in_params  # pyright: ignore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from llama import SIZES, Llama
from losses import next_token_loss

DEVICES = 8


def optimizers(rank: int) -> dict[str, Any]:
    # One power step, as at every refresh but the first.
    find = functools.partial(go.subspace_iteration, iterations=1)
    return {
        "gum": go.gum(1e-3, rank, find_subspace=find),
        "galore_muon": go.galore_muon(1e-3, rank, find_subspace=find),
    }


def model(name: str) -> tuple[Any, Any]:
    """The loss of a model, and the shapes of its parameters."""
    graph, params = nnx.split(
        nnx.eval_shape(lambda: Llama(SIZES[name], dtype=jnp.float32, rngs=nnx.Rngs(0))), nnx.Param
    )
    return functools.partial(next_token_loss, graph), params


def plain_update(tx: Any, loss: Any, batches: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """The update of the mean gradient, which is accumulated and averaged whole."""
    own = jax.lax.pcast(params, "data", to="varying")
    start = jax.lax.pcast(optax.tree.zeros_like(params), "data", to="varying")

    def one(total, batch):
        return jax.tree.map(jnp.add, total, jax.grad(loss)(own, batch)), None

    gradients, _ = jax.lax.scan(one, start, batches)
    count = jax.tree.leaves(batches)[0].shape[0]
    return tx.update(jax.lax.pmean(jax.tree.map(lambda x: x / count, gradients), "data"), state, params)


def accumulated(jaxpr: Any, microbatches: int) -> int:
    """Bytes that the loop over the microbatches carries, without refreshes."""

    def loops(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan" and eqn.params["length"] == microbatches:
                yield eqn
            elif eqn.primitive.name != "cond":
                for sub in jaxprs_in_params(eqn.params):
                    yield from loops(sub)

    # The model may have loops of this length, too: take the one that carries most.
    carried = [eqn.outvars for eqn in loops(jaxpr)]
    return max(sum(v.aval.size * v.aval.dtype.itemsize for v in variables) for variables in carried)


def measure(name: str, optimizer: str, projected: bool, microbatches: int, length: int) -> dict[str, float]:
    """MiB of matrices sent in an update and in a refresh, and carried from microbatch to microbatch.

    The temporaries are those of the whole program.
    """
    loss, params = model(name)
    tx = optimizers(SIZES[name].rank)[optimizer]
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))

    def update(params, state, batches):
        if projected:
            _, updates, state = go.projected_update(tx, loss, batches, state, params, axes="data")
        else:
            updates, state = plain_update(tx, loss, batches, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.shard_map(update, mesh=mesh, in_specs=(P(), P(), P(None, "data")), out_specs=P())
    tokens = jax.ShapeDtypeStruct((microbatches, DEVICES, length + 1), jnp.int32)
    arguments = params, jax.eval_shape(tx.init, params), tokens
    start = time.perf_counter()
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(*arguments)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    found = collectives(compiled.as_text() or "", DEVICES)
    analysis = compiled.memory_analysis()
    assert analysis is not None
    others = unprojected(params)
    sizes = {
        "sent": total([c for c in found if not c.refresh]) - others * 2 * (DEVICES - 1) / DEVICES,
        "refresh": total([c for c in found if c.refresh]),
        "accumulated": accumulated(traced.jaxpr.jaxpr, microbatches) - others,
        "temporaries": analysis.temp_size_in_bytes,
    }
    return {key: size / 2**20 for key, size in sizes.items()} | {"compile_seconds": seconds}


def unprojected(params: Any) -> int:
    """Bytes of the leaves that are not matrices (embedding, head, norms); they are always averaged whole."""
    matrices = go.hidden_matrices(params)
    leaves = jax.tree.leaves(params)
    entries = jax.tree.structure(params).flatten_up_to(matrices)
    return sum(x.size * x.dtype.itemsize for x, entry in zip(leaves, entries, strict=True) if entry is None)


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    heads = ["sent", "more at a refresh", "accumulated", "temporaries"]
    lines = ["| | " + " | ".join(f"{head}, MiB" for head in heads) + " | compiled in |", "|---" * 6 + "|"]
    for name, row in rows.items():
        *sizes, seconds = row.values()
        lines.append(f"| {name} | " + " | ".join(f"{x:.1f}" for x in sizes) + f" | {seconds:.0f} s |")
    return lines


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=SIZES, default="60m")
    p.add_argument("--optimizers", default="gum,galore_muon")
    p.add_argument("--microbatches", type=int, default=4)
    p.add_argument("--seq", type=int, default=256, help="tokens a window")
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    rows = {}
    for name in options.optimizers.split(","):
        for projected in (False, True):
            row = measure(options.model, name, projected, options.microbatches, options.seq)
            rows[f"`{name}`, {'projected' if projected else 'plain'}"] = row
            print(name, projected, {key: round(x, 2) for key, x in row.items()}, flush=True)
    setting = f"{options.model}, {options.microbatches} microbatches, {DEVICES} devices"
    Results(options.out / "projected.json", table).add(setting, rows)


if __name__ == "__main__":
    main()
