#!/usr/bin/env bash
# jax 0.12.0.1, compiled for a GPU: one `reduce` of three arrays over their columns writes the arrays out first, one of two
# arrays does not, and over rows no number of arrays does.
#
# `jax.lax.reduce` takes several arrays of one shape, and one kernel then makes all their sums. What makes the arrays, here
# a square of a product, is fused into that kernel. Over the second axis from the last this holds for two arrays of a stack;
# from three on each array is computed and stored before the sums read it, which takes memory of the size of all of them and
# one kernel more for each. Three reductions by themselves store nothing. So to launch fewer kernels, join columns by twos,
# and rows as you like.
#
# Seen with Python 3.13 and the versions below, ahead of time for a described GPU of compute capability 9.0 (neither a
# GPU nor a driver is needed; two wheels, 200 MB): the lines under EXPECTED, temporaries of the compiled program over the
# bytes of one array, for reductions together and by themselves. The script fails when they change.
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

SHAPE = (12, 512, 512)
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


def together(axis, squares):
    start = [jnp.float32(0)] * len(squares)
    return jax.lax.reduce(squares, start, lambda a, b: [x + y for x, y in zip(a, b)], (axis,))


def alone(axis, squares):
    return [jnp.sum(x, axis) for x in squares]


def temporaries(sums, axis, count):
    """Of the sums of squares of `count` scaled arrays, over the bytes of one."""

    def step(arrays, scales):
        return sums(axis, [jnp.square(x * s) for x, s in zip(arrays, scales)])

    scale = [1 if i == 3 - axis else size for i, size in enumerate(SHAPE)]
    shapes = [[jax.ShapeDtypeStruct(s, jnp.float32, sharding=place)] * count for s in (SHAPE, tuple(scale))]
    analysis = jax.jit(step).lower(*shapes).compile().memory_analysis()
    return analysis.temp_size_in_bytes / (4 * SHAPE[0] * SHAPE[1] * SHAPE[2])


jax.config.update("jax_platforms", "cpu")
described = topologies.get_topology_desc("described", platform="cuda", topology="1x1x1", target_config=CONFIG)
place = jax.sharding.SingleDeviceSharding(described.devices[0])
for name, axis in (("columns", 1), ("rows", 2)):
    for count in (2, 3, 4):
        found = [temporaries(sums, axis, count) for sums in (together, alone)]
        print(f"jax {jax.__version__}, {name}, {count} arrays: together {found[0]:.1f}, alone {found[1]:.1f}")
PYTHON
env/bin/python sums.py 2> errors | tee seen

cat > EXPECTED <<'TEXT'
jax 0.12.0.1, columns, 2 arrays: together 0.0, alone 0.0
jax 0.12.0.1, columns, 3 arrays: together 3.0, alone 0.0
jax 0.12.0.1, columns, 4 arrays: together 4.0, alone 0.0
jax 0.12.0.1, rows, 2 arrays: together 0.0, alone 0.0
jax 0.12.0.1, rows, 3 arrays: together 0.0, alone 0.0
jax 0.12.0.1, rows, 4 arrays: together 0.0, alone 0.0
TEXT
diff EXPECTED seen
echo "as described"
