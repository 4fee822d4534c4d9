"""Real runs in other trainers. Each has an environment of its own: `nox -s trainers`."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "examples" / "trainers"
STEPS = 6

pytestmark = pytest.mark.trainers


@pytest.fixture(scope="module", params=["tunix", "kauldron", "maxtext", "levanter"])
def trainer(request):
    if importlib.util.find_spec(request.param) is None and os.environ.get("TRAINER") != request.param:
        pytest.skip(f"needs {request.param}: nox -s 'trainers({request.param})'")
    return request.param


def train(trainer, out, steps=STEPS, devices=1):
    """What the script printed."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    script = SCRIPTS / f"with_{trainer}.py"
    command = [sys.executable, str(script), "--steps", str(steps), "--out", str(out)]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def records(out):
    """Steps and losses in the order in which they were written."""
    lines = map(json.loads, (out / "losses.jsonl").read_text().splitlines())
    return [(int(line["step"]), line.get("loss", line.get("learning/loss"))) for line in lines]


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """A run that nothing stops: what it printed, and its losses."""
    out = tmp_path_factory.mktemp(trainer) / "whole"
    return train(trainer, out), records(out)


# A kernel of a layer, or of two that are scanned, 16 wide and 32 deep: projector and momentum at rank 4.
KERNEL = {
    "tunix": ("gate_proj", ()),
    "kauldron": ("up", ()),
    "maxtext": ("wi_0", (2,)),
    "levanter": ("gate_proj", (2,)),
}


def arrays(printed):
    """Shape of every array that `report` printed, and whether it is sharded, by its path."""
    found = re.findall(r"^(\S.*) (\(.*\)) (sharded|replicated)$", printed, re.MULTILINE)
    return {path: (ast.literal_eval(shape), where == "sharded") for path, shape, where in found}


def test_gum_sees_the_matrices_of_the_model_and_the_loss_falls(trainer, whole):
    printed, found = whole
    assert {"devices 1", "refreshes 2"} <= set(printed.splitlines())
    name, layers = KERNEL[trainer]
    shapes = {path: shape for path, (shape, _) in arrays(printed).items()}
    kernels = {path: shape for path, shape in shapes.items() if name in path}
    assert {shape for path, shape in kernels.items() if "projectors" in path} == {(*layers, 16, 4)}
    assert {shape for path, shape in kernels.items() if "trace" in path} == {(*layers, 4, 32)}
    assert any("slots" in path for path in shapes)
    losses = [loss for _, loss in found]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])


def stopped_and_resumed(trainer, out, devices):
    """The records of a run in two goes, after a look at where the second one began; and what it printed."""
    train(trainer, out, steps=STEPS // 2, devices=devices)
    first = records(out)
    printed = train(trainer, out, devices=devices)
    second = records(out)[len(first) :]
    # Kauldron takes the step at which it stopped a second time, which must be the same.
    again = second[0][0] == first[-1][0]
    assert second[0][0] == first[-1][0] + (not again)
    assert not again or second[0] == first[-1]
    return first + second[again:], printed


def test_a_run_that_was_stopped_goes_on_to_the_bit(trainer, whole, tmp_path):
    found, printed = stopped_and_resumed(trainer, tmp_path, devices=1)
    assert found == whole[1]
    assert arrays(printed) == arrays(whole[0])


def test_sharded_over_four_devices_and_resumed_it_is_the_same_run(trainer, whole, tmp_path):
    found, printed = stopped_and_resumed(trainer, tmp_path, devices=4)
    np.testing.assert_allclose(found, whole[1], rtol=1e-5)
    assert {"devices 4", "refreshes 2"} <= set(printed.splitlines())
    here, there = ({path: x[0] for path, x in arrays(text).items()} for text in (printed, whole[0]))
    assert here == there
    for kind in ("projectors", "slots"):
        assert any(is_sharded for path, (_, is_sharded) in arrays(printed).items() if kind in path), kind
