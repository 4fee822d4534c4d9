"""Real runs in other trainers. Each has an environment of its own: `nox -s trainers`."""

import importlib.util
import json
import os
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
    if importlib.util.find_spec(request.param) is None:
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


def test_gum_has_its_slots_and_the_loss_falls(trainer, whole):
    printed, found = whole
    # MaxText keeps its state to itself; there the script prints what was planned.
    assert ("slots" if trainer == "maxtext" else "'refresh_count': Array(2") in printed
    losses = [loss for _, loss in found]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])


def stopped_and_resumed(trainer, out, devices):
    """The records of a run in two goes, after a look at where the second one began."""
    train(trainer, out, steps=STEPS // 2, devices=devices)
    first = records(out)
    train(trainer, out, devices=devices)
    second = records(out)[len(first) :]
    # Kauldron takes the step at which it stopped a second time, which must be the same.
    again = second[0][0] == first[-1][0]
    assert second[0][0] == first[-1][0] + (not again)
    assert not again or second[0] == first[-1]
    return first + second[again:]


def test_a_run_that_was_stopped_goes_on_to_the_bit(trainer, whole, tmp_path):
    assert stopped_and_resumed(trainer, tmp_path, devices=1) == whole[1]


def test_sharded_over_four_devices_and_resumed_it_is_the_same_run(trainer, whole, tmp_path):
    found = stopped_and_resumed(trainer, tmp_path, devices=4)
    np.testing.assert_allclose(found, whole[1], rtol=1e-5)
