"""Kernels, conditionals and temporaries of programs compiled for a GPU, without a GPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import kernels  # noqa: E402

PROGRAM = """HloModule step, is_scheduled=true

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %next = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %next)
}

%costly (q: f32[4]) -> f32[4] {
  %a = f32[4]{0} copy(%q)
  %b = f32[4]{0} copy(%a)
  ROOT %c = f32[4]{0} custom-call(%b), custom_call_target="cusolver"
}

%cheap (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %d = f32[4]{0} copy(%q)
}

ENTRY %main (g: f32[4], refresh: pred[]) -> (f32[4], f32[4]) {
  %g = f32[4]{0} parameter(0)
  %start = (s32[], f32[4]{0}) tuple(%zero, %g)
  %five = (s32[], f32[4]{0}) while(%start), condition=%cond, body=%body, KNOWN
  %some = (s32[], f32[4]{0}) while(%five), condition=%cond, body=%body
  %chosen = f32[4]{0} conditional(%refresh, %g, %g), true_computation=%costly, false_computation=%cheap
  %first = (f32[4]{0}, /*index=1*/f32[4]{0}) fusion(%chosen, %g), kind=kInput, calls=%fused.1
  ROOT %out = (f32[4]{0}, f32[4]{0}) tuple(%first, %chosen)
}
""".replace("KNOWN", 'backend_config={"known_trip_count":{"n":"5"}}')


def test_launches_are_counted_through_loops_and_the_cheapest_branch():
    # Five turns, one turn of a loop of unknown length, the cheap branch, a fusion.
    assert kernels.launches(PROGRAM) == (5 + 1 + 1 + 1, 1, 1)


def test_the_script_adds_to_what_was_measured_and_writes_the_table(tmp_path):
    common = ["--chip", "cpu", "--kinds", "scanned", "--out", str(tmp_path), "--optimizers"]
    for name in ("optax.adamw", "sinkgd"):
        kernels.main([*common, name])
    (found,) = json.loads((tmp_path / "kernels.json").read_text())["settings"].values()
    assert list(found["rows"]) == ["optax.adamw", "sinkgd"]
    assert 0 < found["rows"]["optax.adamw"]["kernels"] < found["rows"]["sinkgd"]["kernels"]
    assert (tmp_path / "kernels.md").read_text().count("| `sinkgd` |") == 1


# Temporaries over the gradients, and kernels of an ordinary step, which has at most one conditional and no
# loop of unknown length.
BUDGETS = {
    "scanned": {
        "gum": (0.3, 552),
        "galore_muon": (0.15, 276),
        "muon": (0.4, 552),
        "swan": (0.4, 766),
        "sumo": (0.3, 715),
        "sinkgd": (0.05, 78),
    },
    "separate": {
        "gum": (0.3, 1644),
        "galore_muon": (0.15, 1644),
        "muon": (0.1, 1644),
        "swan": (0.1, 1880),
        "sumo": (0.3, 4400),
        "sinkgd": (0.05, 516),
    },
}
INSTALL = "needs XLA's CUDA plugin: nox -s gpu, or pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin"


needs_plugin = pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason=INSTALL)


@needs_plugin
def test_the_lines_of_the_page_compile_for_a_gpu():
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "gpu.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT / "benchmarks", env=os.environ, capture_output=True, text=True
    )
    assert "temporaries" in done.stdout, done.stderr


@needs_plugin
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] * (kind == "separate")) for kind in BUDGETS]
)
def test_an_ordinary_step_on_a_gpu(kind, tmp_path):
    """In a process of its own: a plugin of CUDA changes which devices JAX looks for."""
    budgets = BUDGETS[kind]
    command = [sys.executable, "benchmarks/kernels.py", "--kinds", kind, "--out", str(tmp_path)]
    env = os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": ""}
    subprocess.run([*command, "--optimizers", ",".join(budgets)], cwd=ROOT, env=env, check=True)
    (found,) = json.loads((tmp_path / "kernels.json").read_text())["settings"].values()
    assert found["rows"].keys() == budgets.keys()
    for name, (temporaries, launched) in budgets.items():
        row = found["rows"][name]
        assert row["temporaries"] <= temporaries, (name, row)
        assert row["kernels"] <= launched, (name, row)
        assert row["conditionals"] <= 1, (name, row)
        assert row["loops"] == 0, (name, row)


# Temporaries of a whole training step of separate layers (width × layers) over the gradients. AdamW holds
# 0.42, 0.56, 0.20, and 1.25 with as many tokens as the width. `muon` holds the scratch of one matrix, which
# is three of eight, and not the gradients.
AS_MANY_TOKENS = "2048 × 8, 2048 tokens"
WHOLE_STEP_BUDGETS = {
    "sinkgd": {"512 × 8": 0.42, "256 × 12": 0.58, AS_MANY_TOKENS: 1.26},
    "muon": {"2048 × 8": 0.38, AS_MANY_TOKENS: 1.26},
    "galore_muon": {AS_MANY_TOKENS: 1.35},
    "gum": {AS_MANY_TOKENS: 1.37},
}


@needs_plugin
def test_a_training_step_on_a_gpu_frees_each_gradient(tmp_path):
    command = [sys.executable, "benchmarks/memory.py", "--platform", "h200", "--whole-steps"]
    command += ["--optimizers", ",".join(WHOLE_STEP_BUDGETS), "--out", str(tmp_path)]
    env = os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": ""}
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    found = json.loads((tmp_path / "memory.json").read_text())["whole_steps"]
    for name, budgets in WHOLE_STEP_BUDGETS.items():
        for size, budget in budgets.items():
            assert found[name]["h200 " + size] <= budget, (name, found[name])
