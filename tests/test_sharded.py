"""On a mesh of forced host devices: what is exchanged, and that the result is the single device's."""

import json
import os
import subprocess
import sys

import pytest

# In a process of its own: the number of host devices is fixed when JAX starts.
SCRIPT = """
import json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import gum_optax as go

mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
kernel = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
tx = go.sinkgd(0.1)
alone, _ = jax.jit(tx.update)({"kernel": jnp.asarray(kernel)}, tx.init({"kernel": kernel}))
found = {}
for spec in (P("x", None), P(None, "x"), P("x", "y"), P(("x", "y"), None)):
    g = {"kernel": jax.device_put(kernel, NamedSharding(mesh, spec))}
    compiled = jax.jit(tx.update).lower(g, tx.init(g)).compile()
    u, _ = compiled(g, tx.init(g))
    # An operation may exchange several arrays at once: every shape of its result counts.
    operation = r"= (.*?) (all-[a-z]+|reduce-scatter|collective-[a-z]+)(?:-start)?\\("
    found[str(spec)] = {
        "collectives": [
            [kind, int(np.prod([int(d) for d in shape.split(",") if d]))]
            for result, kind in re.findall(operation, compiled.as_text())
            for shape in re.findall(r"\\[([\\d,]*)\\]", result)
        ],
        "error": float(np.abs(np.asarray(u["kernel"]) - np.asarray(alone["kernel"])).max()),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_sinkgd_exchanges_vectors_only(found):
    """No collective has more numbers than the matrix has rows or columns, however it is sharded."""
    for spec, result in found.items():
        assert result["collectives"], spec
        for kind, size in result["collectives"]:
            assert kind == "all-reduce", (spec, kind)
            assert size <= 96, (spec, size)


def test_sharded_sinkgd_is_sinkgd(found):
    for spec, result in found.items():
        assert result["error"] < 1e-6, spec
