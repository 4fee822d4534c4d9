"""The benchmarks that need a better machine run here too, at toy size, so that they can't rot."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "examples"))

import accelerator  # noqa: E402
import guard  # noqa: E402
import momentum_dtype  # noqa: E402
import results  # noqa: E402
import scaling  # noqa: E402
import training_step  # noqa: E402


def settings_of(path):
    return {name: found["rows"] for name, found in json.loads(path.read_text())["settings"].items()}


def test_the_accelerator_script_checks_measures_and_trains(tmp_path, monkeypatch):
    few = {name: accelerator.OPTIMIZERS[name] for name in ("adamw", "gum")}
    monkeypatch.setattr(accelerator, "OPTIMIZERS", few)
    monkeypatch.setattr(accelerator, "PEERS", ("optax.contrib.muon",))
    monkeypatch.setattr(accelerator, "OURS", ("gum",))
    monkeypatch.setattr(accelerator, "TRAINED", ("adamw", "gum"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {i}th sentence is about {i * i}. " for i in range(3000)))
    accelerator.main(["--small", "--text", str(text), "--out", str(tmp_path)])
    check, lean, fast, trained = settings_of(tmp_path / "accelerator.json").values()
    assert check.keys() == few.keys()
    assert all(row["agrees"] for row in check.values())
    assert lean["gum"]["state"] < lean["optax.contrib.muon"]["state"]
    assert fast["gum"]["step"] > 0
    assert list(trained) == ["adamw", "gum"]
    assert all(np.isfinite(row["val_loss"]) for row in trained.values())
    assert (tmp_path / "accelerator.png").stat().st_size > 0
    assert (tmp_path / "accelerator.md").read_text().count("| `gum` |") == 4


def test_the_check_sees_an_optimizer_that_differs_on_the_device(monkeypatch):
    made = iter([optax.sgd(0.1), optax.sgd(0.2)])
    monkeypatch.setattr(accelerator, "OPTIMIZERS", {"adamw": accelerator.OPTIMIZERS["adamw"]})
    monkeypatch.setattr(accelerator, "optimizer", lambda settings: next(made))
    assert not accelerator.check(steps=2)["adamw"]["agrees"]


def test_a_training_step_is_timed_beside_sgd(tmp_path):
    common = ["--batch", "2", "--seq", "8", "--rounds", "2", "--out", str(tmp_path)]
    training_step.main([*common, "--model", "tiny", "--optimizers", "optax.sgd,galore_muon"])
    (rows,) = settings_of(tmp_path / "training_step.json").values()
    assert rows["optax.sgd"]["over_sgd"] == 1
    assert rows["galore_muon"]["tokens_per_second"] > 0
    assert "| `optax.sgd` |" in (tmp_path / "training_step.md").read_text()


@pytest.mark.long
def test_what_grows_how_is_measured_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "NAMES", ("optax.adamw", "galore_muon"))
    scaling.main(["--small", "--rounds", "1", "--out", str(tmp_path)])
    axes = json.loads((tmp_path / "scaling.json").read_text())["axes"]
    assert set(axes) == {"layers", "rank", "width"}
    ranks = axes["rank"]["galore_muon"]
    assert ranks["4"]["state"] > ranks["2"]["state"]
    assert axes["width"]["optax.adamw"]["32"]["state"] == pytest.approx(2, rel=0.01)
    assert (tmp_path / "scaling.png").stat().st_size > 0


def test_the_table_of_momentum_dtypes_has_a_mean_and_a_deviation_over_the_seeds():
    runs = {"gum float32": {"0": 4.0, "1": 5.0}, "gum bfloat16": {"0": 4.25}, "muon float32": {"0": 3.0}}
    assert momentum_dtype.table(runs)[2:] == [
        "| `gum` | 4.5000 ± 0.7071 | 4.2500 |",
        "| `muon` | 3.0000 |  |",
    ]


def test_a_setting_measured_again_replaces_itself_and_no_other(tmp_path):
    for value in (1, 2):
        kept = results.Results(tmp_path / "x.json", lambda rows: [str(rows)])
        kept.add("a", value)
        kept.add(f"b{value}", value)
    data = json.loads((tmp_path / "x.json").read_text())["settings"]
    assert {name: found["rows"] for name, found in data.items()} == {"a": 2, "b1": 1, "b2": 2}
    assert data["a"]["versions"]["jax"] == jax.__version__
    assert (tmp_path / "x.md").read_text() == "a:\n\n2\n\nb1:\n\n1\n\nb2:\n\n2\n"
    assert jnp.asarray(0).devices().pop().device_kind in data["a"]["machine"]


def test_the_guard_is_timed_beside_the_rule_alone(tmp_path, monkeypatch):
    made = guard.rules
    few = ("galore_muon", "gum")
    monkeypatch.setattr(guard, "rules", lambda rank: {name: made(rank)[name] for name in few})
    common = ["--model", "tiny", "--rank", "4", "--kinds", "scanned", "--rounds", "1"]
    guard.main([*common, "--out", str(tmp_path)])
    (rows,) = settings_of(tmp_path / "guard.json").values()
    assert len(rows) == 6
    assert all(row["step"] > 0 for row in rows.values())
    for rule in few:  # the state is kept where it is made: no second one
        alone, built_in = (rows[f"{rule}, {how}"]["temporaries"] for how in ("alone", "skip_non_finite"))
        assert built_in < 1.03 * alone
        assert rows[f"{rule}, optax.apply_if_finite"]["temporaries"] > 1.3 * alone
    assert (tmp_path / "guard.md").read_text().count("skip_non_finite") == 2
