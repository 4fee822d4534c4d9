#!/usr/bin/env bash
# jax 0.12.0.1, compiled for a GPU: `W + (Gᵀ + P X)ᵀ` holds two copies of the matrices, `W + (G + (P X)ᵀ)` holds none.
#
# The two are equal, entry by entry. XLA's GPU compiler folds the transpose of a product into the product, and adds the
# product to `G` and to a donated `W` where it stands. It does not take the transpose into a sum: it then writes `P X`
# to memory, writes the transposed sum beside it, and copies that over `W`. Code that turns a tall weight so that its
# short side comes first, computes a step and turns the step back, as optimizers of matrices do, pays this if the
# step has a sum of a turned array and a product. Transpose the product alone.
#
# Seen with Python 3.13 and the versions below, ahead of time for a described GPU of compute capability 9.0 (neither a
# GPU nor a driver is needed; two wheels, 200 MB): the lines under EXPECTED, temporaries of the compiled programs over
# the bytes of `W`. jax 0.10.2 gives the same. The script fails when they change.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3.13}" -m venv env
env/bin/python -m pip install -q "jax==0.12.0.1"
env/bin/python -m pip install -q --no-deps "jax-cuda12-pjrt==0.12.0.1" "jax-cuda12-plugin==0.12.0.1"

cat > sums.py <<'PYTHON'
import os

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # before jax is imported

import jax
import jax.numpy as jnp
from jax.experimental import topologies

LAYERS, M, N, R = 12, 1376, 512, 64
CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "described"
"""


def sum_transposed(w, g, p, x):
    return w + (g.mT + p @ x).mT


def product_transposed(w, g, p, x):
    return w + (g + (p @ x).mT)


jax.config.update("jax_platforms", "cpu")
described = topologies.get_topology_desc("described", platform="cuda", topology="1x1x1", target_config=CONFIG)
place = jax.sharding.SingleDeviceSharding(described.devices[0])
w, p, x = (
    jax.ShapeDtypeStruct((LAYERS, *sides), jnp.float32, sharding=place) for sides in ((M, N), (N, R), (R, M))
)
for step in (sum_transposed, product_transposed):
    program = jax.jit(step, donate_argnums=(0, 1)).lower(w, w, p, x).compile()
    share = program.memory_analysis().temp_size_in_bytes / (4 * LAYERS * M * N)
    print(f"jax {jax.__version__}, {step.__name__}: {share:.2f}")
PYTHON
env/bin/python sums.py 2> errors | tee seen

cat > EXPECTED <<'TEXT'
jax 0.12.0.1, sum_transposed: 2.00
jax 0.12.0.1, product_transposed: 0.00
TEXT
diff EXPECTED seen
echo "as described"
