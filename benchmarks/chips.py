"""Chips that programs are compiled for ahead of time, without the chip.

A TPU needs libtpu. A GPU needs XLA's CUDA plugin, but neither the CUDA toolkit nor a driver:

    python -m pip install --no-deps jax-cuda12-pjrt==V jax-cuda12-plugin==V     # V: the version of jaxlib

Both need `jax_platforms="cpu"`, and the GPU `JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1` before jax is imported.
"""

from typing import Any

import jax
from jax.experimental import topologies

from gum_optax._core import chips as described

# NVIDIA's data sheets and the tuning guides for compute capability 9.0 and 8.9. What both chips share: 1024
# threads a block, warps of 32, 65536 registers.
_GPUS = {
    "h200": {
        "core_count": 132,
        "threads_per_core_limit": 2048,
        "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448,
        "l2_cache_size": 52428800,
        "memory_bandwidth": 4_800_000_000_000,
        "clock_rate_ghz": 1.98,
        "capability": (9, 0),
    },
    "24gb": {
        "core_count": 128,
        "threads_per_core_limit": 1536,
        "shared_memory_per_core": 102400,
        "shared_memory_per_block_optin": 101376,
        "l2_cache_size": 75497472,
        "memory_bandwidth": 1_008_000_000_000,
        "clock_rate_ghz": 2.52,
        "capability": (8, 9),
    },
}
# A machine with each kind of TPU.
_TPUS = {"tpu": "v5e:2x4", "v5e": "v5e:2x4", "v6e": "v6e:2x4"}
CHIPS = ("cpu", *_TPUS, *_GPUS)
# What the package says of them.
KNOWN = {"cpu": described.CPU, "tpu": described.CHIPS["v5e"], **described.CHIPS}
# The packages that compile for a chip, for the record of versions.
_COMPILERS = {"cpu": [], "tpu": ["libtpu"], "gpu": ["jax-cuda12-pjrt"]}
PACKAGES = {name: _COMPILERS[chip.platform] for name, chip in KNOWN.items()}


def device_of(chip: str) -> Any:
    """The description of one chip, or True for the CPU at hand, as `memory_report(compiled=...)` takes it.

    Args:
      chip: `cpu`, `v5e` or `tpu`, `v6e`, `h200`, or `24gb`, a card of compute capability 8.9.
    """
    return True if chip == "cpu" else devices_of(chip, 1)[0]


def devices_of(chip: str, count: int) -> list[Any]:
    """The descriptions of several chips of one machine; of the CPU, the devices that JAX has."""
    if chip == "cpu":
        return jax.devices("cpu")[:count]
    if chip in _TPUS:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=_TPUS[chip]).devices)[:count]
    # Slices, hosts, and devices of a host.
    described = topologies.get_topology_desc(
        chip, platform="cuda", topology=f"1x1x{count}", target_config=_target_config(chip)
    )
    return list(described.devices)


def on_chip(shapes: Any, device: Any) -> Any:
    """The shapes as arguments on a device that `device_of` has given."""
    if device is True:
        return shapes
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def _target_config(chip: str) -> str:
    """XLA's text proto of a GPU."""
    numbers = dict(_GPUS[chip])
    major, minor = numbers.pop("capability")
    numbers |= {
        "device_memory_size": described.CHIPS[chip].memory,
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    fields = " ".join(f"{name}: {number}" for name, number in numbers.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f'gpu_device_info {{ {fields} {capability} }} platform_name: "CUDA"'
        f' dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{chip}"'
    )
