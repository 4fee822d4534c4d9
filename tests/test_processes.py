"""Two processes as two hosts of one mesh: the same run as in one process, and a checkpoint for every mesh."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Restores the checkpoint of two processes on meshes of one, and compares it with what they gathered.
RESTORE = """
import sys
import on_eight_devices as run
import jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
import gum_optax as go
from on_two_processes import optimizer
folder = sys.argv[1]
expected = list(np.load(folder + "/run.npz").values())
((params, state), _), _ = run.on_mesh(lambda _: optimizer(), AxisType.Auto)
# Sums over processes round otherwise than sums within one; what is drawn and counted does not.
for a, b in zip(jax.tree.leaves((params, state)), expected, strict=True):
    exact = jax.numpy.issubdtype(a.dtype, jax.numpy.integer)
    np.testing.assert_allclose(a, b, rtol=0, atol=0 if exact else 1e-5)
for sizes in ((1, 8), (4, 2), (1, 1)):
    devices = jax.devices()[: sizes[0] * sizes[1]]
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), run.SPECS)
    states = go.state_shardings(optimizer(), params, shardings)
    like = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        {"params": params, "state": state}, {"params": shardings, "state": states},
    )
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(folder + "/checkpoint", like)
    leaves = jax.tree.leaves((found["params"], found["state"]))
    for a, b, at in zip(leaves, expected, jax.tree.leaves((shardings, states)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == at
print("restored")
"""


def python(*arguments, devices):
    env = os.environ | {"HOST_DEVICES": str(devices)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=HERE, env=env, **pipes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left, and what each of them printed."""
    folder = tmp_path_factory.mktemp("run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [python("on_two_processes.py", address, str(i), str(folder), devices=4) for i in range(2)]
    for i, process in enumerate(both):
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        (folder / f"{i}.txt").write_text(out)
    return folder


def test_two_processes_run_as_one_and_their_checkpoint_fits_every_mesh(folder):
    out, error = python("-c", RESTORE, str(folder), devices=8).communicate(timeout=300)
    assert out.splitlines()[-1:] == ["restored"], error


@pytest.mark.parametrize("process", [0, 1])
def test_a_seed_of_its_own_in_each_process_is_caught_and_named(folder, process):
    message = (folder / f"{process}.txt").read_text()
    assert "key" in message
    assert "[[0, 0], [0, 1]]" in message
    assert "same key" in message
