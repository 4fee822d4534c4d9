"""What a training step holds, predicted from shapes and compiled."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from gum_optax import report
from gum_optax._core.chips import CHIPS
from gum_optax._state import update_temporaries as temporaries
from gum_optax._state.step_memory import Activations, Update, bytes_of, layerwise_step, ordinary_step

from helpers import sequential_steps

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import layerwise  # noqa: E402

TOKENS = 128
SMALL = layerwise.model_of(256, 672, 4, 1024)._replace(layers=4)


@pytest.mark.parametrize("kind", layerwise.STEPS)
@pytest.mark.parametrize("name", ["optax.adamw", pytest.param("gum", marks=sequential_steps)])
def test_the_prediction_is_within_a_tenth_of_the_compiled_step(name, kind):
    update = layerwise.updates(32, jnp.float32)[name]
    row = layerwise.measure(kind, update.tx, SMALL, TOKENS, jnp.float32)
    predicted = layerwise.predicted(kind, update, SMALL, TOKENS, jnp.float32, "cpu")
    assert predicted == pytest.approx(row["arguments"] + row["temporaries"], rel=0.1)
    needed = report.activations(SMALL, 1, TOKENS, jnp.float32)
    held = report.steps(SMALL, update, needed, TOKENS + 1, jnp.float32, "cpu")[kind].held
    assert held / 2**20 == pytest.approx(row["arguments"], rel=1e-3)


def test_the_predictions_in_the_results_are_within_a_tenth():
    """The largest figures that the benchmark has compiled, of GUM and AdamW, for every chip."""
    rows = layerwise.Results(ROOT / "docs" / "results" / "layerwise.json", layerwise.table).data["settings"]
    checked = [
        (setting, name, row["predicted"] / (row["arguments"] + row["temporaries"]))
        for setting, found in rows.items()
        for name, row in found["rows"].items()
        if name.startswith(("`gum", "`optax.adamw")) and "predicted" in row
    ]
    assert len(checked) > 10
    assert [x for x in checked if not 0.9 <= x[-1] <= 1.1] == []


def test_the_peak_is_that_of_the_phase_that_holds_most():
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {
        "embed": {"embedding": leaf(10, 4)},
        "layers": {"up": {"kernel": leaf(3, 4, 6)}},
        "head": {"lm_head": {"kernel": leaf(4, 10)}},
    }
    fused = temporaries.of_fused
    update = Update(optax.sgd(1.0), fused, fused)
    held, table, layer = 4 * (40 + 72 + 40) + 7, 4 * 40, 4 * 24
    ordinary = ordinary_step(update, params, 7, Activations(100, 20, 3000))
    assert ordinary.held == held
    assert ordinary.peak == held + 100 + 3000 + table
    assert ordinary.phases["backward"] == 100 + 20 + bytes_of(params)
    split = layerwise_step(update, params, 7, Activations(100, 20, 30), "gpu")
    assert split.phases == {"head": 100 + 30 + table, "layer": 100 + 20 + layer, "embedding": table}
    on_cpu = layerwise_step(update, params, 7, Activations(100, 20, 30), "cpu")
    assert on_cpu.phases["layer"] == split.phases["layer"] + layer  # its copy of the parameters
    tied = params | {"head": {"norm": leaf(4)}}
    assert layerwise_step(update, tied, 7, Activations(0, 0, 0), "gpu").phases["layer"] == layer + table


def test_temporaries_are_those_of_the_equations():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((12, 8, 20), (12, 20, 8), (12, 8))]
    matrices = 2 * 12 * 160
    assert temporaries.of_galore_muon(2)(shapes) == 4 * 2 * 12 * 2 * 20
    assert temporaries.of_gum(2, 1 / 8)(shapes) == 4 * (2 * 12 * 2 * 20 + 3 * 160)
    assert temporaries.of_gum(8, 1 / 8)(shapes) == 0  # nothing is projected
    assert temporaries.of_muon("tpu")(shapes) == 2 * matrices
    assert temporaries.of_optax_muon(True)(shapes) == 2 * matrices
    assert temporaries.of_optax_muon(False)(shapes) == 10 * matrices
    wide = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in shapes]
    assert temporaries.of_muon("tpu")(wide) == 4 * 2 * (160 + 64)
    assert temporaries.of_muon("gpu")(wide) == 4 * 6 * 2 * (160 + 64)
    few = [jax.ShapeDtypeStruct((2, 8, 9), jnp.float32)]
    assert temporaries.of_muon("gpu")(few) == 4 * 2 * 2 * (72 + 64)


@pytest.mark.parametrize("chip", CHIPS)
def test_the_program_says_what_fits_on_a_chip(chip, capsys):
    report.main(["--model", "llama-3-8b", "--chip", chip])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(f"llama-3-8b on {chip}: {CHIPS[chip].memory / 2**30:.1f} GiB")
    rows = {line[2:26].strip(): line[26:].split() for line in lines if line}
    assert {"optax.adamw", "optax.contrib.muon", "muon", "galore_muon", "gum", "sinkgd"} <= set(rows)
    for held, whole, _, split, _ in rows.values():
        assert float(held) < float(split) < float(whole)
    # Compiled for the 24 GB card: 19.6 GiB, and 59.1 of an ordinary step with AdamW.
    assert float(rows["gum, factored others"][3]) == pytest.approx(19.6, rel=0.1)
    assert float(rows["optax.adamw"][1]) == pytest.approx(59.1, rel=0.1)
    expected = {"h200": ("fits", "fits"), "24gb": ("no", "fits"), "v6e": ("no", "fits"), "v5e": ("no", "no")}
    assert (rows["optax.adamw"][2], rows["gum, factored others"][4]) == expected[chip]


def test_the_page_shows_what_the_program_prints(capsys):
    report.main(["--model", "llama-3-8b", "--chip", "24gb"])
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "gpu.md").read_text()


def test_inputs_and_logits_grow_with_the_tokens_and_a_loss_in_chunks_holds_a_second_gradient_of_the_head():
    model = report.MODELS["llama-3-8b"]
    few, many, chunked = (
        report.activations(model, batch, 1024, "bfloat16", at_once)
        for batch, at_once in ((1, None), (4, None), (4, 2**25))
    )
    assert few.inputs == 32 * 1024 * 4096 * 2
    assert few.logits == 1024 * 128256 * 4
    assert many == Activations(*(4 * x for x in few))
    assert chunked == many._replace(logits=4 * 2**25 + 4096 * 128256 * 2)
    assert report.activations(model, 1, 1024, "bfloat16", 2**30) == few


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--chip", "h300"], "invalid choice: 'h300'"),
        (["--chip", "h200", "--batch", "0"], "must be an integer of at least 1, got '0'"),
        (["--chip", "h200", "--seq", "many"], "must be an integer of at least 1, got 'many'"),
        (["--rank", "-3"], "must be an integer of at least 1, got '-3'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--full-rank-fraction", "1.5"], "--full-rank-fraction must be between 0 and 1, got 1.5"),
    ],
)
def test_what_is_no_size_is_refused(wrong, message, capsys):
    with pytest.raises(SystemExit):
        report.main(wrong)
    assert message in capsys.readouterr().err
