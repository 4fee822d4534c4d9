"""Every optimizer on a mesh of eight host devices: `test_sharded.py` runs this in a separate process.

python tests/on_eight_devices.py NAME ...            prints one line of JSON
python tests/on_eight_devices.py NAME,FINDER ...     at an ordinary size; a hang ends the process
"""

import contextlib
import faulthandler
import inspect
import json
import math
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# Put this flag first: the last flag wins.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

# Threads for XLA: a collective in a conditional may run beside another one, each holds a thread of each
# device until all devices have come, and XLA has only as many threads as devices.
os.environ.setdefault("NPROC", "32")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gum_optax as go

from helpers import OPTIMIZERS, sequence

# One tree with all layouts: a mesh axis on either side (FSDP, tensor parallel), both on one side, one
# per side, scanned layers, experts as a batch axis, attention heads. Rank 2 is a multiple of one axis only.
LAYOUTS = {
    "rows": ((8, 16), P("model", None)),
    "columns": ((8, 16), P(None, ("data", "model"))),
    "both": ((8, 16), P("data", "model")),
    "scanned": ((4, 16, 8), P(None, "data", "model")),
    "experts": ((2, 8, 8, 8), P(None, "model", "data", None)),
    "query": ((8, 8, 4), P("data", "model", None)),
}
SPECS = {name: {"kernel": spec} for name, (_, spec) in LAYOUTS.items()} | {"bias": P("model")}
STEPS = 5
EIGHT_BITS = OPTIMIZERS["gum"][1] | {"momentum_dtype": "int8", "others": go.adamw_8bit(1e-2)}
KNOWN = OPTIMIZERS | {"eight bits": (go.gum, EIGHT_BITS)}
# Updates of other optimizers run in the same wrapper, and `state_shardings` traces their `init`.
ON_EXPLICIT_AXES = ("muon", "galore_muon", "gum", "sinkgd", "eight bits")


def values():
    """Parameters, and the gradients of each step."""
    rng = np.random.default_rng(0)
    runs = {name: sequence(rng, shape, STEPS + 1) for name, (shape, _) in LAYOUTS.items()}
    biases = rng.normal(size=(STEPS + 1, 16)).astype(np.float32)
    return [
        {name: {"kernel": run[step]} for name, run in runs.items()} | {"bias": biases[step]}
        for step in range(STEPS + 1)
    ]


def twice(tx, place, state_of, out=None):
    """Parameters and state after all steps, for two runs of the same program."""

    def step(g, state, params):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, out_shardings=out)
    found = []
    for _ in range(2):
        params, *gradients = map(place, values())
        state = state_of(params)
        for g in gradients:
            # Run one program at a time: eight devices share the cores.
            params, state = jax.block_until_ready(step(g, state, params))
        found.append((params, state))
    return found


def on_mesh(tx_for, kind, *, sizes=(2, 4), planned=True):
    """`twice` under Auto axes, with or without `state_shardings`, or under Explicit axes without them."""
    devices = jax.devices()[: math.prod(sizes)]
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(kind,) * 2, devices=devices)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    tx = tx_for(shardings)
    born = go.state_shardings(tx, values()[0], shardings)
    out = (shardings, born) if kind == AxisType.Auto and planned else None
    init = jax.jit(tx.init, out_shardings=out and born)

    def place(tree):
        return jax.device_put(tree, shardings)

    # Users of Explicit axes set the mesh; users of Auto axes do not.
    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        return twice(tx, place, init, out), (shardings, born)


def compared(runs, shardings, alone):
    (here, again), (expected, _) = runs, alone
    return {
        "gap": max(jax.tree.leaves(jax.tree.map(gap, here[0], expected[0]))),
        "repeats": all(jax.tree.leaves(jax.tree.map(np.array_equal, here, again))),
        "draws": all(jax.tree.leaves(jax.tree.map(same_integers, here, expected))),
        "stays": all(jax.tree.leaves(jax.tree.map(is_placed, here, shardings))),
    }


def check(name):
    make, arguments = KNOWN[name]

    def plain(shardings):
        return make(1e-2, **arguments)

    def told(shardings):
        return make(1e-2, **arguments, weight_dimension_numbers=go.with_shardings(shardings))

    tx = plain(None)
    alone = twice(tx, lambda tree: jax.tree.map(jnp.asarray, tree), jax.jit(tx.init))
    kinds = (AxisType.Auto, AxisType.Explicit) if name in ON_EXPLICIT_AXES else (AxisType.Auto,)
    found = {kind.name: compared(*on_mesh(plain, kind), alone) for kind in kinds}
    if name == "gum":
        runs, _ = on_mesh(plain, AxisType.Auto, planned=False)
        found["nothing said"] = compared(runs, jax.tree.map(lambda x: x.sharding, runs[0]), alone)
    if name in ("gum", "muon"):
        alone, _ = on_mesh(told, AxisType.Auto, sizes=(1, 1))
        found["told"] = compared(*on_mesh(told, AxisType.Auto), alone)
    return found


# Large enough to make every factorization of a stack worth several threads (jaxlib: 2e5 operations).
ORDINARY, ORDINARY_RANK = (4, 64, 96), 48
LIMIT = 120  # seconds per case, most of them compilation


def at_size(case):
    """The gap to a single device after two refreshes; ends the process if that takes too long."""
    print(f"started {case}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    name, finder = case.split(",")
    make, arguments = OPTIMIZERS[name]
    # Replace the arguments that the optimizer has: this rank is worth threads, and each step is a refresh.
    larger = {"rank": ORDINARY_RANK, "period": 1}
    arguments = arguments | {word: larger[word] for word in arguments if word in larger}
    if "eps" in inspect.signature(make).parameters:
        # Adam's first steps are nearly signs, and a coordinate near zero rounds to either.
        arguments["eps"] = 1e-2
    if finder:
        arguments["find_subspace"] = getattr(go, finder)
    tx = make(1e-2, **arguments)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharding = {"kernel": NamedSharding(mesh, P(None, "data", "model"))}
    gradients = [{"kernel": g} for g in sequence(np.random.default_rng(0), ORDINARY, 3)]
    born = go.state_shardings(tx, gradients[0], sharding)
    here = after_all(tx, [jax.device_put(g, sharding) for g in gradients], (sharding, born))
    alone = after_all(tx, jax.tree.map(jnp.asarray, gradients), None)
    faulthandler.cancel_dump_traceback_later()
    return gap(here["kernel"], alone["kernel"])


def after_all(tx, gradients, out):
    """The parameters after a step on each gradient but the first, which serves as initial parameters."""
    params, *gradients = gradients
    state = jax.jit(tx.init, out_shardings=out and out[1])(params)
    step = jax.jit(tx.update, out_shardings=out)
    for g in gradients:
        updates, state = jax.block_until_ready(step(g, state, params))
        params = optax.apply_updates(params, updates)
    return params


def same_integers(a, b):
    """Whether counts, keys and draws are equal; ignores floating-point numbers and codes of eight bits."""
    return a.dtype.itemsize == 1 or np.issubdtype(a.dtype, np.inexact) or np.array_equal(a, b)


def gap(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def is_placed(x, sharding):
    return x.sharding.is_equivalent_to(sharding, x.ndim)


if __name__ == "__main__":
    print(json.dumps({case: at_size(case) if "," in case else check(case) for case in sys.argv[1:]}))
