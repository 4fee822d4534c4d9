#!/usr/bin/env bash
# jax 0.12.0.1, compiled for a GPU: `where(ok, gradient, 0.0)` of an embedding's gradient holds a table of zeros,
# `where(ok, gradient, -0.0)` holds none.
#
# The gradient of a lookup is a scatter into a table of zeros. XLA takes the zeros of `where` for the same array. The
# scatter writes in place, so the table is made twice: one is written into, the other is kept to be read as zeros. With
# a vocabulary of 128,256 and width 4096 in bfloat16 that is 1 GiB. It happens wherever a step is skipped by a select, by the
# finiteness of the loss as by that of the gradient. -0.0 is another constant, is fused, and adds nothing to a number:
# `w + (-0.0)` is `w` for every `w`, where `-0.0 + 0.0` is 0.0. A select between new and old parameters holds none either.
#
# Seen with Python 3.13 and the versions below, ahead of time for a described GPU of compute capability 9.0 (neither a
# GPU nor a driver is needed; two wheels, 200 MB): the lines under EXPECTED, temporaries of the compiled programs over
# the bytes of the table; 1.00 of them is the gradient. jax 0.10.2 gives the same. The script fails when they change.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3.13}" -m venv env
env/bin/python -m pip install -q "jax==0.12.0.1"
env/bin/python -m pip install -q --no-deps "jax-cuda12-pjrt==0.12.0.1" "jax-cuda12-plugin==0.12.0.1"

cat > zeros.py <<'PYTHON'
import os

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # before jax is imported

import jax
import jax.numpy as jnp
from jax.experimental import topologies

VOCABULARY, WIDTH, TOKENS = 32768, 512, 256
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


def gradient_of(table, tokens):
    return jax.grad(lambda table: jnp.mean(jnp.sin(table[tokens]) ** 2))(table)


def zero(table, tokens):
    g = gradient_of(table, tokens)
    return table - jnp.where(jnp.all(jnp.isfinite(g)), g, 0.0)


def negative_zero(table, tokens):
    g = gradient_of(table, tokens)
    return table - jnp.where(jnp.all(jnp.isfinite(g)), g, -0.0)


def old_parameters(table, tokens):
    g = gradient_of(table, tokens)
    return jnp.where(jnp.all(jnp.isfinite(g)), table - g, table)


jax.config.update("jax_platforms", "cpu")
described = topologies.get_topology_desc("described", platform="cuda", topology="1x1x1", target_config=CONFIG)
place = jax.sharding.SingleDeviceSharding(described.devices[0])
table = jax.ShapeDtypeStruct((VOCABULARY, WIDTH), jnp.float32, sharding=place)
tokens = jax.ShapeDtypeStruct((TOKENS,), jnp.int32, sharding=place)
for step in (zero, negative_zero, old_parameters):
    program = jax.jit(step, donate_argnums=0).lower(table, tokens).compile()
    share = program.memory_analysis().temp_size_in_bytes / (4 * VOCABULARY * WIDTH)
    print(f"jax {jax.__version__}, {step.__name__}: {share:.1f}")
PYTHON
env/bin/python zeros.py 2> errors | tee seen

cat > EXPECTED <<'TEXT'
jax 0.12.0.1, zero: 2.0
jax 0.12.0.1, negative_zero: 1.0
jax 0.12.0.1, old_parameters: 1.0
TEXT
diff EXPECTED seen
echo "as described"
