"""Protected subspaces and walks along directions on a mesh: what they do on one device."""

import json
import os
import subprocess
import sys

# Runs in a separate process, because the number of host devices is fixed when JAX starts.
SCRIPT = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import gum_optax as go

def gap(a, b):
    return float(np.abs(np.asarray(a["kernel"]) - np.asarray(b["kernel"])).max())

w, gaps = {"kernel": jax.random.normal(jax.random.key(0), (2, 4, 6))}, {}
alone = {name: go.walk(w, 0, 0.1, 3, directions=d) for name, d in
         (("gaussian", go.gaussian), ("low rank", go.low_rank_directions(2, 3)))}
tx = go.protect(go.muon(0.1))
expected, _ = tx.update(w, tx.init(w), w)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    for spec in (P("x", None, None), P(None, "x", None), P(None, None, "x")):
        sharding = {"kernel": NamedSharding(mesh, spec)}
        with jax.set_mesh(mesh):
            p = jax.device_put(w, sharding)
            for name, d in (("gaussian", go.gaussian), ("low rank", go.low_rank_directions(2, 3))):
                found = jax.jit(lambda p, d=d: go.walk(p, 0, 0.1, 3, directions=d))(p)
                gaps[f"{kind.name} {spec} {name}"] = gap(found, alone[name])
            out = go.state_shardings(tx, w, sharding) if kind == AxisType.Auto else None
            state = jax.jit(tx.init, out_shardings=out)(p)
            updates, _ = jax.jit(tx.update)(p, state, p)
            gaps[f"{kind.name} {spec} protect"] = gap(updates, expected)
print(json.dumps(gaps))
"""


def test_on_a_mesh_they_do_what_they_do_on_one_device():
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gaps = json.loads(done.stdout.splitlines()[-1])
    assert len(gaps) == 18
    assert max(gaps.values()) < 1e-5, gaps
