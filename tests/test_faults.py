"""Injected faults: damaged checkpoints, and kill -9 at any moment of a run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gum_optax as go

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import optimizers  # noqa: E402
import training  # noqa: E402

SETTINGS = optimizers.Settings("gum", "tiny", 2, 1, 1, 1.0, 1.0, 2, 3, 0.3, 0.0, 0, "none")


def opened(path, *, resume):
    directory = training.RunDirectory(path, SETTINGS, resume=resume)
    directory.open()
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of two steps with a checkpoint of each: its directory, a trainer at its start, its states."""
    path = tmp_path_factory.mktemp("saved") / "run"
    tx = go.gum(0.1, rank=2, period=3, full_rank_fraction=0.3)
    params = {"kernel": jax.random.normal(jax.random.key(0), (5, 6, 9))}
    state = start = params, tx.init(params)
    directory, states = opened(path, resume=False), {}
    with directory.metrics_file.open("a") as file:
        for step in (1, 2):
            updates, inner = tx.update(*state, state[0])
            state = states[step] = jax.tree.map(jnp.add, state[0], updates), inner
            directory.save(types.SimpleNamespace(state=state, step=step))
            file.write(json.dumps({"step": step, "seconds": 1.0}) + "\n")
    directory.close()
    return path, start, states


def files_of(path):
    return sorted(x for x in (path / "checkpoints" / "2").rglob("*") if x.is_file() and x.stat().st_size)


def damaged(data, how):
    middle = len(data) // 2
    return {
        "cut": data[:middle],
        "flipped": data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :],
        "gone": None,
    }[how]


def restored_with_damage(saved, copy, files, how):
    """The step from which a run resumes after damage to the newest checkpoint; checks its state."""
    path, start, _ = saved
    shutil.copytree(path, copy)
    for file in files:
        victim = copy / file.relative_to(path)
        data = damaged(victim.read_bytes(), how)
        victim.unlink() if data is None else victim.write_bytes(data)
    directory = opened(copy, resume=True)
    trainer = types.SimpleNamespace(state=start, step=0, seconds=0.0)
    directory.restore(trainer)
    directory.close()
    assert [r["step"] for r in directory.records()] == list(range(1, trainer.step + 1))
    jax.tree.map(np.testing.assert_array_equal, trainer.state, saved[2][trainer.step])
    return trainer.step


@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_of_a_damaged_checkpoint_it_says_so_and_takes_the_one_before(saved, tmp_path, how, capsys):
    arrays = [file for file in files_of(saved[0]) if file.parent.name == "d"]
    assert restored_with_damage(saved, tmp_path / "run", arrays, how) == 1
    assert "The checkpoint of step 2 can't be read, trying an older one:" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_whichever_file_is_damaged_no_wrong_number_comes_back(saved, tmp_path, how):
    steps = [
        restored_with_damage(saved, tmp_path / str(i), [file], how)
        for i, file in enumerate(files_of(saved[0]))
    ]
    assert set(steps) == {1, 2}  # some files matter, some do not


def pretrain(text, out, cache, *more):
    command = [
        sys.executable,
        str(EXAMPLES / "pretrain.py"),
        "--model",
        "tiny",
        "--batch",
        "2",
        "--seq",
        "16",
    ]
    command += ["--steps", "4000", "--period", "7", "--save-every", "20", "--eval-every", "4000"]
    env = os.environ | {"XDG_CACHE_HOME": str(cache)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, "--text", str(text), "--out", str(out), *more], env=env, **quiet)


def finish(process):
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()


def losses(out):
    return [json.loads(line)["train_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_a_run_that_is_killed_25_times_is_the_run_that_is_not(seed, tmp_path):
    """kill -9 at random moments, also during the start and saves; four such runs have a hundred kills."""
    text, whole, out = tmp_path / "text.txt", tmp_path / "whole", tmp_path / "killed"
    text.write_text("".join(f"The {i}th sentence is about {i * i}.\n\n" for i in range(2000)))
    finish(pretrain(text, whole, tmp_path, "--seed", str(seed)))
    draw, furthest = random.Random(seed), []
    for _ in range(25):
        more = ["--resume"] if (out / "settings.json").exists() else []
        process = pretrain(text, out, tmp_path, "--seed", str(seed), *more)
        time.sleep(draw.uniform(0, 7))
        assert process.poll() is None, process.stderr.read().decode()
        process.send_signal(signal.SIGKILL)
        process.wait()
        furthest.append(len(list((out / "checkpoints").glob("[0-9]*"))) if out.exists() else 0)
    finish(pretrain(text, out, tmp_path, "--seed", str(seed), "--resume"))
    assert losses(out) == losses(whole)
    assert len(losses(out)) == 4000
    assert furthest[-1] > 0  # some kills came after a save
