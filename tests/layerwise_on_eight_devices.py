"""Steps layer by layer on a mesh of eight host devices: `test_on_devices.py` runs this in a separate process.

python tests/layerwise_on_eight_devices.py     prints one line of JSON
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Put this flag first: the last flag wins.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
os.environ.setdefault("NPROC", "32")  # see on_eight_devices.py

import functools
import json
import sys
from pathlib import Path

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layerwise_model import batch, embed, gap, head, layer, params, run, small_gum

import gum_optax as go

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from distributed import shardings_of

WINDOWS, STEPS = 8, 4  # two periods
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def start_of():
    """Parameters small enough that a rounding stays one."""
    return jax.tree.map(lambda x: x / 2, params(width=16, wide=24))


def on_mesh(parallel, options):
    """The last parameters and the losses on the mesh."""
    start = start_of()
    shardings = shardings_of(start, MESH, parallel)
    tx = small_gum(weight_decay=0.1, weight_dimension_numbers=go.with_shardings(shardings))
    of_state = go.state_shardings(tx, start, shardings)
    axis = P(None, "data") if options["microbatches"] > 1 else P("data")
    data = jax.device_put(batches(options), NamedSharding(MESH, axis))

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(shardings, of_state, None))
    def step(own, state, data):
        value, own, state = go.layerwise_update(tx, embed, layer, head, data, state, own, **options)
        return own, state, value

    own, losses = jax.device_put(start, shardings), []
    state = jax.jit(tx.init, out_shardings=of_state)(own)
    for tokens in data:
        own, state, value = jax.block_until_ready(step(own, state, tokens))
        losses.append(float(value))
    return own, losses


def batches(options):
    count = options["microbatches"]
    found = [batch(i, WINDOWS * count) for i in range(STEPS)]
    return jax.tree.map(lambda x: x.reshape(count, WINDOWS, -1) if count > 1 else x, found)


@functools.cache
def alone(microbatches):
    """The same on one device."""
    tx = small_gum(weight_decay=0.1)
    options = {"microbatches": microbatches}

    def step(own, state, data):
        value, own, state = go.layerwise_update(tx, embed, layer, head, data, state, own, **options)
        return own, state, value

    own, _, losses = run(jax.jit(step), tx, start_of(), batches(options))
    return own, losses


def main():
    found = {}
    for name, parallel, options in (
        ("fsdp", "fsdp", {"microbatches": 1}),
        ("fsdp, microbatches", "fsdp", {"microbatches": 2, "keep_every": 2}),
        ("data", "data", {"microbatches": 1}),
    ):
        own, losses = on_mesh(parallel, options)
        expected, values = alone(options["microbatches"])
        found[name] = {
            "gap": gap(own, expected),
            "losses": max(abs(a / b - 1) for a, b in zip(losses, values, strict=True)),
            "split": sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(own)),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
