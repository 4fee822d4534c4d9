"""Two processes with four host devices each, as one mesh: `test_processes.py` runs this twice at a time.

python tests/on_two_processes.py ADDRESS PROCESS FOLDER      leaves a checkpoint and params.npz
"""

import os
import sys

import jax
import numpy as np
import on_eight_devices as run  # sets the number of devices before JAX starts
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType

import gum_optax as go


def optimizer(key=0):
    return go.gum(1e-2, rank=2, period=3, full_rank_fraction=0.3, key=key)


def main(process, folder):
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
    ((params, state), _), (_, born) = run.on_mesh(lambda _: optimizer(), AxisType.Auto)
    go.check_processes_agree(state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.join(folder, "checkpoint"), {"params": params, "state": state})
    whole = multihost_utils.process_allgather((params, state), tiled=True)
    if process == 0:
        np.savez(os.path.join(folder, "run.npz"), *jax.tree.leaves(whole))
    # Give each process its own seed: its programs hold other numbers, and JAX does not notice.
    other = jax.jit(optimizer(key=process).init, out_shardings=born)(params)
    try:
        go.check_processes_agree(other)
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    address, process, folder = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(process), coordinator_bind_address=address)
    main(int(process), folder)
