"""Temporaries of the compiled step over the gradients' bytes, on twelve layers: exact, so a test."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import memory  # noqa: E402

WIDTH, FF, RANK = memory.SIZES["512"]
# Scanned, the step of the largest leaf alone is 0.22 of the gradients, and XLA's CPU backend fuses no product
# with what reads it; a TPU does.
BUDGETS = {
    ("galore_muon", False): 0.15,
    ("gum", False): 0.3,
    ("sumo", False): 0.25,
    ("sinkgd", False): 0.01,
    ("muon", False): 0.1,
    ("galore_muon", True): 0.3,
    ("gum", True): 0.55,
    ("sumo", True): 0.45,
    ("sinkgd", True): 0.01,
}


@pytest.mark.parametrize(
    ("name", "scanned"), BUDGETS, ids=lambda x: {True: "scanned", False: "separate"}.get(x, x)
)
def test_temporaries_on_a_cpu(name, scanned):
    shapes = memory.layers(WIDTH, FF, 12, scanned=scanned)
    share = memory.measure(memory.optimizers(RANK)[name](), shapes, device=True)
    assert share <= BUDGETS[name, scanned]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu")
def test_temporaries_on_a_tpu(tmp_path):
    """In a process of its own: libtpu takes long to forget."""
    command = [sys.executable, "benchmarks/memory.py", "--platform", "tpu", "--out", str(tmp_path)]
    command += ["--optimizers", "galore_muon,sinkgd", "--kinds", "scanned"]
    out = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True).stdout
    shares = {line.split()[-2]: float(line.split()[-1]) for line in out.splitlines()}
    assert shares["galore_muon"] <= 0.1
    assert shares["sinkgd"] <= 0.1


def test_the_table_has_a_row_an_optimizer_and_keeps_what_was_measured_elsewhere(tmp_path):
    for names in ("optax.adamw", "sinkgd,galore_muon"):
        memory.main(["--layers", "1", "--optimizers", names, "--out", str(tmp_path)])
    lines = (tmp_path / "memory.md").read_text().splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == ["optax.adamw", "sinkgd", "galore_muon"]
    assert lines[0] == "| optimizer | cpu 512 × 1 separate | cpu 512 × 1 scanned |"
