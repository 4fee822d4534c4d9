"""Two processes as two hosts of one mesh give the run of one process, and a checkpoint for every mesh."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gum_optax._core.keys import key_data

HERE = Path(__file__).resolve().parent.parent

# Restores the checkpoint of two processes on meshes of one process, and compares it with their arrays.
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


# Runs of `examples/distributed.py` in one process: FSDP, `projected_update`, a resumed run, another run.
ALONE = """
import sys
sys.path.insert(0, "../examples")
import distributed
folder, way, *common = sys.argv[1:]
projected = [["projected", "--parallel", "projected", "--microbatches", "2"]] if way == "projected" else []
for name, *way in (["fsdp"], *projected, ["stopped"]):
    assert distributed.main([*common, *way, "--out", f"{folder}/{name}"]) == 0
assert distributed.main([*common, "--seed", "1", "--out", f"{folder}/fsdp"]) == 2
"""

# An ordinary run, one layer by layer, and what follows its checkpoint in the middle.
LAYERWISE = """
import shutil, sys
sys.path.insert(0, "../examples")
import distributed
folder, *common = sys.argv[1:]
by_layer = [*common, "--layerwise", "--out", folder + "/by_layer"]
assert distributed.main([*common, "--out", folder + "/whole"]) == 0
assert distributed.main(by_layer) == 0
shutil.rmtree(folder + "/by_layer/50")
assert distributed.main(by_layer) == 0
assert distributed.main([*common, "--out", folder + "/by_layer"]) == 2
"""


def python(*arguments, devices, env=os.environ):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=HERE, env=env | {"XLA_FLAGS": flags}, **pipes)


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of two processes, and the output of each."""
    folder = tmp_path_factory.mktemp("run")
    address = free_address()
    both = [python("on_two_processes.py", address, str(i), str(folder), devices=4) for i in range(2)]
    for i, process in enumerate(both):
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        (folder / f"{i}.txt").write_text(out)
    return folder


def test_two_processes_run_as_one_and_their_checkpoint_fits_every_mesh(folder):
    out, error = python("-c", RESTORE, str(folder), devices=8).communicate(timeout=300)
    assert out.splitlines()[-1:] == ["restored"], error
    for process in range(2):  # the error names the seed that differs between the processes
        message = (folder / f"{process}.txt").read_text()
        assert "key" in message
        assert str([key_data(seed).tolist() for seed in range(2)]) in message
        assert "same key" in message


def losses_of(text):
    """The printed losses of each run of `distributed.py`, by step."""
    runs = []
    for line in text.splitlines():
        if line.startswith("8 devices"):
            runs.append({})
        elif line.startswith("{"):
            record = json.loads(line)
            runs[-1][record["step"]] = record["loss"]
    return runs


@pytest.mark.parametrize(
    "way",
    [pytest.param([way], marks=pytest.mark.long) for way in ("fsdp", "data", "projected")],
    ids=lambda way: way[0],
)
def test_a_run_of_two_processes_is_that_of_one_each_way_and_outlives_a_preemption(tmp_path, way):
    """One of two processes gets SIGTERM: both save, and one process with eight devices continues."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {i}th sentence is about {i * i}.\n\n" for i in range(2000)))
    common = ["--model", "tiny", "--batch", "16", "--seq", "16", "--steps", "30", "--period", "4"]
    common += ["--save-every", "1000", "--text", str(text)]
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    where = ["--out", str(tmp_path / "stopped"), "--distributed", "--coordinator", free_address()]
    where += ["--parallel", *way, "--processes", "2", "--process"]
    command = ["../examples/distributed.py", *common, *where]
    first, second = (python(*command, str(i), devices=4, env=env) for i in range(2))
    printed = ""
    while '"step": 2' not in printed:
        printed += first.stdout.readline()
        assert first.poll() is None, first.stderr.read()
    second.send_signal(signal.SIGTERM)
    out, error = first.communicate(timeout=300)
    _, other = second.communicate(timeout=300)
    assert (first.returncode, second.returncode) == (0, 0), error + other
    (before,) = losses_of(printed + out)
    assert 2 < len(before) < 30

    alone = python("-c", ALONE, str(tmp_path), *way, *common, devices=8, env=env)
    out, error = alone.communicate(timeout=300)
    assert "holds another run, with seed=0 (asked 1)" in error
    *runs, after = losses_of(out)[: 2 + (way == ["projected"])]
    whole = runs[0]
    for found in (*runs, before | after):
        assert list(found) == list(range(1, 31)), error
        np.testing.assert_allclose([*found.values()], [*whole.values()], rtol=1e-5)
    assert not before.keys() & after.keys()
    assert whole[30] < whole[1] - 0.5


@pytest.mark.long
def test_a_run_layer_by_layer_has_the_losses_of_the_ordinary_run_and_resumes_to_the_bit(tmp_path):
    """FSDP over eight devices, 50 steps; and from the checkpoint of its step 25."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {i}th sentence is about {i * i}.\n\n" for i in range(2000)))
    common = ["--model", "tiny", "--batch", "8", "--seq", "16", "--steps", "50", "--period", "20"]
    common += ["--save-every", "25", "--text", str(text)]
    run = python("-c", LAYERWISE, str(tmp_path), *common, devices=8, env=os.environ | {"NPROC": "32"})
    out, error = run.communicate(timeout=300)
    assert "holds another run, with layerwise=True (asked None)" in error
    whole, by_layer, after, _ = losses_of(out)
    np.testing.assert_allclose([*by_layer.values()], [*whole.values()], rtol=1e-4)
    assert len(by_layer) == 50
    assert after == {step: loss for step, loss in by_layer.items() if step > 25}
