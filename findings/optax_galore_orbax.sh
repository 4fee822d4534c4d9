#!/usr/bin/env bash
# optax 0.2.8 and orbax-checkpoint 0.12.8: a training state of `optax.contrib.galore` cannot be saved as soon as the
# model has a bias or a norm.
#
# For a leaf that GaLore does not project, the state holds an array of shape (0, 0) in place of the projector. Orbax
# refuses arrays without numbers ("Cannot save arrays with zero size"), both in `Checkpointer` and in the
# `CheckpointManager` that trainers use, and does so at the first save, not when the optimizer is made. A model of
# matrices only is saved. `flax.serialization` takes both states.
#
# Seen on a CPU with Python 3.11 and the versions below: the lines under EXPECTED. The script fails when they change.
set -euo pipefail
versions=("jax==0.10.2" "optax==0.2.8" "flax==0.12.8" "orbax-checkpoint==0.12.8")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/python" -m pip install -q "${versions[@]}"

cd "$work"
cat > save.py <<'PYTHON'
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

KERNEL, BIAS = {"kernel": jnp.ones((8, 16))}, {"bias": jnp.ones(16)}


def outcome(f):
    try:
        f()
    except ValueError as error:
        return str(error).split(":")[0]
    return "saved"


def save(state, place):
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(place / "one", args=ocp.args.StandardSave(state))


def save_by_manager(state, place):
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(place / "several", options=options) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))


for name, params in (("kernel", KERNEL), ("kernel and bias", KERNEL | BIAS)):
    state = optax.contrib.galore(1e-3, rank=4).init(params)
    place = Path.cwd() / name
    shapes = [x.shape for x in jax.tree.leaves(optax.tree.get(state, "projector"))]
    print(f"{name}: projectors {shapes}")
    print(f"{name}: Checkpointer: {outcome(lambda: save(state, place))}")
    print(f"{name}: CheckpointManager: {outcome(lambda: save_by_manager(state, place))}")
    print(f"{name}: flax.serialization: {outcome(lambda: flax.serialization.to_bytes(state))}")
PYTHON
JAX_PLATFORMS=cpu "$work/env/bin/python" save.py > seen 2> errors.txt || {
  tail -20 errors.txt
  exit 1
}
cat > EXPECTED <<'TEXT'
kernel: projectors [(16, 4)]
kernel: Checkpointer: saved
kernel: CheckpointManager: saved
kernel: flax.serialization: saved
kernel and bias: projectors [(0, 0), (16, 4)]
kernel and bias: Checkpointer: Cannot save arrays with zero size
kernel and bias: CheckpointManager: Cannot save arrays with zero size
kernel and bias: flax.serialization: saved
TEXT
cat seen
diff EXPECTED seen && echo "Unchanged: Orbax cannot save GaLore's state of a model with a bias."
