"""Temporaries of whole training steps, gradients and activations included: exact, so a test."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import layerwise_model
import optax
import pytest

import gum_optax as go

from helpers import sequential_steps

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import layerwise  # noqa: E402

SMALL = layerwise.MODELS["64"]


def share_of(kind, tx, model=SMALL, dtype=jnp.float32):
    row = layerwise.measure(kind, tx, model, 128, dtype)
    return row["temporaries"] / row["gradients"]


def test_half_of_the_gradients_on_a_cpu():
    """Twelve layers of width 512; the gradients alone are 1.0 in an ordinary step."""
    tx = layerwise.updates(64, jnp.float32)["gum"].tx
    assert share_of("layer by layer", tx, layerwise.MODELS["512"]) <= 0.5


def test_no_stack_of_gradients_is_made():
    """In the loop, nothing but parameters, state and what they become has an axis of twelve layers."""
    model = SMALL._replace(layers=11)
    tx = optax.sgd(1e-3)
    text = layerwise.compiled("layer by layer", tx, model, 128, jnp.float32).as_text()
    stacks = re.findall(r"%\S+ = f32\[11,64,176\]\S* ([\w-]+)\(", text)
    assert stacks
    assert {"broadcast", "copy", "transpose", "concatenate"}.isdisjoint(stacks)
    ordinary = layerwise.compiled("ordinary", tx, model, 128, jnp.float32).as_text()
    assert "broadcast" in re.findall(r"%\S+ = f32\[11,64,176\]\S* ([\w-]+)\(", ordinary)


def test_the_step_is_that_of_the_ordinary_step():
    model = SMALL._replace(layers=2)
    tx = go.galore_muon(1e-2, 8, 2)
    key = jax.random.key(0)
    shapes = layerwise.shapes_of(model, jnp.float32)
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    start = treedef.unflatten(
        [jax.random.normal(k, x.shape) * x.shape[-1] ** -0.5 for k, x in zip(keys, leaves, strict=True)]
    )
    tokens = jax.random.randint(key, (1, 33), 0, model.vocabulary)
    results = []
    for step in layerwise.STEPS.values():
        params, state = start, tx.init(start)
        one = jax.jit(step(tx, model))
        for _ in range(3):
            params, state, _ = one(params, state, tokens)
        results.append(params)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert float(jnp.abs(a - b).max() / jnp.abs(a).max()) < 1e-5


def test_the_script_adds_to_what_was_measured(tmp_path):
    for name in ("optax.sgd", "optax.adamw"):
        layerwise.main(["--width", "64", "--optimizers", name, "--out", str(tmp_path)])
    (found,) = json.loads((tmp_path / "layerwise.json").read_text())["settings"].values()
    assert len(found["rows"]) == 4
    for name in ("optax.sgd", "optax.adamw"):
        ordinary, by_layer = (found["rows"][f"`{name}`, {kind}"]["temporaries"] for kind in layerwise.STEPS)
        assert by_layer < ordinary
    assert (tmp_path / "layerwise.md").read_text().count("layer by layer |") == 2


GPU_BUDGETS = {"512": 0.3, "2048": 0.2}
INSTALL = "needs XLA's CUDA plugin: nox -s gpu, or pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin"


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason=INSTALL)
@pytest.mark.parametrize("width", GPU_BUDGETS)
def test_a_fraction_of_the_gradients_on_a_gpu(width, tmp_path):
    """In a process of its own: a plugin of CUDA changes which devices JAX looks for."""
    command = [sys.executable, "benchmarks/layerwise.py", "--chip", "h200", "--width", width]
    command += ["--optimizers", "gum", "--steps", "layer by layer", "--out", str(tmp_path)]
    env = os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": ""}
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    (found,) = json.loads((tmp_path / "layerwise.json").read_text())["settings"].values()
    (row,) = found["rows"].values()
    assert row["temporaries"] <= GPU_BUDGETS[width] * row["gradients"]


# Temporaries over the size of a vocabulary's table, which is most of this model.
TABLES = """
import json, sys
sys.path.insert(0, "benchmarks")
import jax, jax.numpy as jnp, optax
jax.config.update("jax_platforms", "cpu")
import layerwise
import gum_optax as go
from chips import device_of
model = layerwise.model_of(64, 176, 4, 8192)._replace(layers=2)
found = {}
for name, tx in {"sgd": go.sinkgd(1.0, others=optax.sgd(1.0)), "adamw": go.gum(1.0, 8)}.items():
    for kind in layerwise.STEPS:
        row = layerwise.measure(kind, tx, model, 16, jnp.float32, device_of("h200"))
        found[f"{name}, {kind}"] = row["temporaries"] * 2**20 / (4 * 64 * 8192)
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason=INSTALL)
def test_a_gpu_holds_no_table_but_the_gradients_of_embedding_and_head():
    """A skipped step is no table of zeros, and the head steps before the layers: 3 tables each before."""
    env = os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", TABLES], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sgd, ordinary"] < 2.1
    assert found["adamw, ordinary"] < 2
    assert found["sgd, layer by layer"] < 1.4
    assert found["adamw, layer by layer"] < 1.8


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: nox -s tpu")
def test_a_fraction_of_the_gradients_on_a_tpu(tmp_path):
    """In a process of its own: libtpu takes long to forget."""
    command = [sys.executable, "benchmarks/layerwise.py", "--chip", "v5e", "--width", "2048"]
    command += ["--dtype", "bfloat16", "--optimizers", "gum;muon", "--steps", "layer by layer"]
    env = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, env=env, check=True)
    (found,) = json.loads((tmp_path / "layerwise.json").read_text())["settings"].values()
    assert len(found["rows"]) == 2
    for row in found["rows"].values():
        assert row["temporaries"] <= 0.2 * row["gradients"]


@sequential_steps
def test_inputs_are_kept_of_every_fourth_layer_and_activations_of_one_microbatch():
    """Sixteen layers and 512 windows, whose inputs are most of the temporaries."""
    layers, windows = 16, 512
    start = layerwise_model.params()
    times = layers // layerwise_model.LAYERS
    start["layers"] = jax.tree.map(lambda x: jnp.concatenate([x] * times), start["layers"])
    tx = optax.sgd(1e-2)

    def inputs(**options):
        """Temporaries over the size of one layer's input."""
        data = layerwise_model.batch(0, windows)
        if count := options.get("microbatches"):
            data = jax.tree.map(lambda x: x.reshape(count, windows // count, -1), data)
        step = layerwise_model.layer_by_layer(tx, **options)
        memory = step.lower(start, tx.init(start), data).compile().memory_analysis()
        return memory.temp_size_in_bytes / (4 * data[0].size * layerwise_model.WIDTH)

    all_of_them = inputs()
    assert layers < all_of_them
    assert all_of_them - inputs(keep_every=4) == pytest.approx(layers - (4 + 4), abs=0.2)
    in_eight = inputs(microbatches=8)
    assert in_eight < layers + 6
    assert in_eight - inputs(microbatches=8, keep_every=4) == pytest.approx(layers - (4 + 4), abs=0.2)
