"""Benchmarks for larger machines run here at toy size, so that they keep working."""

import dataclasses
import json
import subprocess
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
import bfloat16_weights  # noqa: E402
import choices  # noqa: E402
import compilation  # noqa: E402
import eight_bits  # noqa: E402
import embedding_rules  # noqa: E402
import guard  # noqa: E402
import layerwise_time  # noqa: E402
import refresh  # noqa: E402
import results  # noqa: E402
import scaling  # noqa: E402
import speed  # noqa: E402
import step_pictures  # noqa: E402
import training_step  # noqa: E402

import corpus_comparison  # noqa: E402


def settings_of(path):
    return {name: found["rows"] for name, found in json.loads(path.read_text())["settings"].items()}


def few(monkeypatch):
    """A benchmark with the smallest sizes that show that every part works."""
    some = {name: accelerator.OPTIMIZERS[name] for name in ("adamw", "gum")}
    monkeypatch.setattr(accelerator, "OPTIMIZERS", some)
    monkeypatch.setattr(accelerator, "PEERS", (speed.PEER,))
    monkeypatch.setattr(accelerator, "OURS", ("galore_muon",))
    monkeypatch.setattr(accelerator, "TRAINED", ("gum",))
    monkeypatch.setattr(accelerator, "STEPPED", ("optax.sgd", "sinkgd"))
    monkeypatch.setattr(scaling, "NAMES", ("galore_muon",))
    kept = ("svd_subspace", "sketched_subspace, 1 step")
    monkeypatch.setattr(refresh, "FINDERS", {name: refresh.FINDERS[name] for name in kept})


def test_the_accelerator_script_checks_measures_and_trains(tmp_path, monkeypatch):
    few(monkeypatch)
    (name, shape), *_ = accelerator.SMALL.shapes.items()
    monkeypatch.setattr(accelerator, "SMALL", accelerator.SMALL._replace(shapes={name: shape}))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {i}th sentence is about {i * i}. " for i in range(3000)))
    accelerator.main(["--small", "--text", str(text), "--out", str(tmp_path)])
    found = settings_of(tmp_path / "accelerator.json")
    trained, check, lean, fast, finders, steps, swept = found.values()
    assert list(trained) == ["gum"]
    assert all(np.isfinite(row["val_loss"]) for row in trained.values())
    assert list(check) == ["adamw", "gum"]
    assert all(row["agrees"] for row in check.values())
    own = lean["galore_muon"]
    assert own["state"] < lean[speed.PEER]["state"]
    assert own["peak"] is None  # a CPU has no such statistics
    assert own["predicted peak"] > own["state"] + own["temporaries"]
    assert own["kernels"] > 0
    assert fast["galore_muon"]["step"] > 0
    assert finders["svd_subspace"]["of the SVD's"] == 1
    assert finders["sketched_subspace, 1 step"]["of the SVD's"] not in (0, 1)
    assert steps["sinkgd"]["over_sgd"] > 0
    assert swept["galore_muon, rank 2"]["temporaries"] > 0
    assert (tmp_path / "accelerator.png").stat().st_size > 0
    text = (tmp_path / "accelerator.md").read_text()
    assert text.count("| of optax's Muon |") == 1
    assert text.count("| over SGD |") == 1


def test_no_process_is_started_for_the_device_once_this_one_holds_it(tmp_path, monkeypatch):
    """One process owns a TPU, and most of a GPU's memory."""
    few(monkeypatch)
    happened = []

    def child(command, **_):
        happened.append("child")
        if "--compare" in command:
            runs = Path(command[command.index("--out") + 1])
            runs.mkdir()
            (runs / "summary.json").write_text(json.dumps([{"optimizer": "gum", "val_loss": 1.0}]))
            (runs / "loss.png").touch()
        return subprocess.CompletedProcess(command, 1, "", "first line\nout of memory")

    def held(what):
        return lambda *_: happened.append("held") or what

    monkeypatch.setattr(accelerator.subprocess, "run", child)
    monkeypatch.setattr(accelerator.jax, "devices", held(jax.devices()))
    accelerator.main(["--small", "--parts", "memory,pretrain", "--out", str(tmp_path)])
    assert happened.count("child") == 2 * 2 + 1
    assert "child" not in happened[happened.index("held") :]
    rows = list(settings_of(tmp_path / "accelerator.json").values())
    assert rows[1]["galore_muon"]["peak"] == "failed: out of memory"


@pytest.mark.parametrize("rate", [0.097, 0.103, float("nan")])
def test_the_check_sees_an_optimizer_that_differs_on_the_device(rate, monkeypatch):
    made = iter([optax.sgd(0.1), optax.sgd(rate)])
    monkeypatch.setattr(accelerator, "OPTIMIZERS", {"adamw": accelerator.OPTIMIZERS["adamw"]})
    monkeypatch.setattr(accelerator, "optimizer", lambda settings: next(made))
    assert not accelerator.check(steps=2)["adamw"]["agrees"]


def test_a_part_that_there_is_not_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        accelerator.main(["--small", "--parts", "memory,sped", "--out", str(tmp_path / "new")])
    assert "got memory,sped" in capsys.readouterr().err


@pytest.mark.long  # as a part of `accelerator.py` above it runs in every test run
def test_a_training_step_is_timed_beside_sgd(tmp_path):
    common = ["--batch", "2", "--seq", "8", "--rounds", "2", "--out", str(tmp_path)]
    training_step.main([*common, "--model", "tiny", "--optimizers", "optax.sgd,galore_muon"])
    (rows,) = settings_of(tmp_path / "training_step.json").values()
    assert rows["optax.sgd"]["over_sgd"] == 1
    assert rows["galore_muon"]["tokens_per_second"] > 0
    assert min(row["temporaries_mib"] for row in rows.values()) > 0
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


def test_a_choice_changes_one_thing_of_a_run_and_its_losses_have_a_deviation_over_the_seeds():
    plain = choices.Settings("gum", "tiny", 4, 1, 1, 0.01, 0.01, 8, 2, 0.25, 0.1, 0, "")
    assert choices.changed(plain, choices.DEFAULT) == plain
    halved = choices.changed(plain, "momentum in bfloat16")
    assert dataclasses.replace(halved, momentum_dtype="float32") == plain != halved
    other = choices.changed(plain, "`newton_schulz` in bfloat16")
    assert dataclasses.replace(other, optimizer="gum") == plain != other
    make, rate = choices.ChoiceTrainer.makers[other.optimizer]
    assert rate == choices.OPTIMIZERS["gum"][1]
    assert make.keywords["orthogonalizer"](jnp.eye(2, 4, dtype=jnp.bfloat16)).dtype == jnp.bfloat16
    runs = {"gum": {choices.DEFAULT: {"0": 4.0, "1": 5.0}, "`newton_schulz`": {"0": 4.25}}}
    assert choices.table(runs)[2:] == ["| `gum` | 4.5000 ± 0.7071 (2) |  | 4.2500 |  |"]


def test_the_variants_of_the_comparison_change_one_thing_of_their_optimizers():
    s = choices.Settings("gum", "tiny", 4, 1, 1, 0.01, 0.01, 2, 2, 0.25, 0.1, 0, "")
    w, g = (jax.random.normal(jax.random.key(seed), (4, 6, 16)) for seed in (0, 1))
    rate, decay = 0.1, 0.5

    def first_step(name):
        make, _ = corpus_comparison.MAKERS[name]
        tx = make(s, rate, others=optax.sgd(rate), weight_decay=decay)
        updates, state = jax.jit(tx.update)({"kernel": g}, tx.init({"kernel": w}), {"kernel": w})
        return updates["kernel"], {x.dtype for x in jax.tree.leaves(state)}

    for name in ("muon", "gum"):
        plain, dtypes = first_step(name)
        step = -plain / rate - decay * w
        cautious, _ = first_step(f"{name}, cautious decay")
        decays = step * w > 0
        np.testing.assert_allclose(cautious, -rate * (step + decay * w * decays), atol=1e-6)
        assert 0 < float(decays.mean()) < 1
        _, of_int8 = first_step(f"{name}, int8")
        assert jnp.dtype("int8") in of_int8 - dtypes
    by_neuron, _ = first_step("gum, a size for each neuron")
    sizes = jnp.linalg.norm(by_neuron + rate * decay * w, axis=-2)
    np.testing.assert_allclose(sizes / sizes.max(-1, keepdims=True), 1, rtol=1e-3)


def test_compilation_is_measured_in_processes_beside_the_peer(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "NAMES", (speed.PEER,))
    compilation.main(["--layers", "1", "--rounds", "1", "--out", str(tmp_path)])
    (rows,) = settings_of(tmp_path / "compilation.json").values()
    assert rows[speed.PEER]["lines"] > 100
    rows["gum"] = {"seconds": 2 * rows[speed.PEER]["seconds"], "lines": rows[speed.PEER]["lines"] // 2}
    assert compilation.table(rows)[-1].split(" | ")[2::2] == ["2.00", "0.50 |"]


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


@pytest.mark.parametrize("name", ["muon", pytest.param("gum", marks=pytest.mark.long)])
def test_the_guard_is_timed_beside_the_rule_alone(name, tmp_path, monkeypatch):
    made = guard.rules
    monkeypatch.setattr(guard, "rules", lambda rank: {name: made(rank)[name]})
    common = ["--model", "tiny", "--rank", "4", "--kinds", "scanned", "--rounds", "1"]
    guard.main([*common, "--out", str(tmp_path)])
    (rows,) = settings_of(tmp_path / "guard.json").values()
    assert len(rows) == 3
    assert all(row["step"] > 0 for row in rows.values())
    # The state is computed in place: no second copy, which is what optax's guard adds. Leaves are so small
    # here that XLA's packing of buffers moves the figure.
    alone, built_in, optax_guard = (rows[f"{name}, {how}"]["temporaries"] for how in guard.GUARDS)
    assert optax_guard > 1.3 * alone
    assert built_in - alone < (optax_guard - alone) / 4
    assert (tmp_path / "guard.md").read_text().count("skip_non_finite") == 1


class Words:
    """A corpus for runs that never read it."""

    name = "words"


def test_each_way_to_keep_the_weights_runs_once_with_the_trainer_that_adds_its_steps(tmp_path, monkeypatch):
    calls = []

    def fake_run(words, chosen, place, stop, trainer):
        calls.append((chosen.optimizer, chosen.weights_dtype, trainer.__name__, chosen.seed))
        return {"val_loss": 4 + 0.5 * chosen.seed}

    monkeypatch.setattr(bfloat16_weights, "run", fake_run)
    monkeypatch.setattr(bfloat16_weights, "Corpus", lambda *_: Words())
    bfloat16_weights.main(["--optimizers", "gum", "--out", str(tmp_path)])
    ways = [("float32", "Trainer"), ("bfloat16", "ToNearest"), ("bfloat16", "Trainer")]
    assert calls == [("gum", *way, seed) for seed in (0, 1) for way in ways]
    cell = "4.2500 ± 0.3536 (2)"
    assert f"| `gum` | {cell} | {cell} | {cell} |" in (tmp_path / "bfloat16_weights.md").read_text()
    bfloat16_weights.main(["--optimizers", "gum", "--out", str(tmp_path)])
    assert len(calls) == 6  # nothing was missing
    p, u = jnp.ones(3, jnp.bfloat16), jnp.full(3, 2.0**-9)
    assert (bfloat16_weights.ToNearest.apply_updates(p, u, 0, 0) == 1).all()


def test_states_of_eight_bits_stand_beside_float32_by_seed(tmp_path, monkeypatch):
    calls = []

    def fake_run(words, chosen, place, stop, trainer, finish):
        assert chosen.optimizer in trainer.makers
        assert chosen.others in trainer.others_makers
        calls.append((chosen.optimizer, chosen.momentum_dtype, chosen.others, chosen.seed))
        is_coded = chosen.momentum_dtype == "int8"
        return {"val_loss": 4 + chosen.seed + 0.25 * is_coded, "state": 2**20 if is_coded else 2**22}

    monkeypatch.setattr(eight_bits, "run", fake_run)
    monkeypatch.setattr(eight_bits, "Corpus", lambda *_: Words())
    arguments = ["--rows", "gum;gum, int8", "--seeds", "0,1", "--out", str(tmp_path)]
    for _ in range(2):  # the second time nothing is missing
        eight_bits.main(arguments)
    assert calls == [("gum", dtype, "adamw", seed) for seed in (0, 1) for dtype in ("float32", "int8")]
    text = (tmp_path / "eight_bits.md").read_text()
    assert "| gum, int8 | 4.7500 ± 0.7071 (2) | +0.2500 | 1.00 MiB | 0.250 |" in text
    rows = json.loads((tmp_path / "eight_bits.json").read_text())["settings"].popitem()[1]["rows"]
    rows["gum"]["seconds"], rows["gum, int8"]["seconds"] = 2.0, 3.0
    assert eight_bits.table(rows)[-1].endswith("| 0.250 | 1.50 |")


def test_momentum_to_nearest_is_within_half_a_code():
    g = {"w": jnp.float32(np.random.default_rng(0).normal(size=(3, 4, 130)))}
    rule = eight_bits.trace_to_nearest(0.9)
    first, state = rule.update(g, rule.init(g))
    assert np.abs(first["w"] - g["w"]).max() <= 0.5001 / 127 * np.abs(g["w"]).max()
    second, _ = rule.update(g, state)
    assert np.abs(second["w"] - 0.9 * first["w"] - g["w"]).max() <= 0.5001 / 127 * 2 * np.abs(g["w"]).max()


def test_the_rate_of_each_rule_for_embeddings_is_searched_and_the_other_seeds_follow(tmp_path, monkeypatch):
    calls = []

    def fake_run(words, chosen, place, stop, trainer):
        assert chosen.others in trainer.others_makers
        calls.append((chosen.others, chosen.others_lr, chosen.seed))
        best = 0.02 if chosen.others == "sign" else 0.005
        return {"val_loss": abs(np.log2(chosen.others_lr / best)) + 0.5 * chosen.seed + len(chosen.others)}

    monkeypatch.setattr(embedding_rules, "run", fake_run)
    monkeypatch.setattr(embedding_rules, "START", 0.01)
    monkeypatch.setattr(embedding_rules, "Corpus", lambda *_: Words())
    embedding_rules.main(["--rules", "adamw;sign", "--out", str(tmp_path)])
    assert calls == [
        *(("adamw", rate, 0) for rate in (0.01, 0.02, 0.005, 0.0025)),
        ("adamw", 0.005, 1), ("adamw", 0.005, 2),
        *(("sign", rate, 0) for rate in (0.01, 0.02, 0.04)), ("sign", 0.02, 1), ("sign", 0.02, 2),
    ]  # fmt: skip
    text = (tmp_path / "embedding_rules.md").read_text()
    assert "| adamw | 0.005 | 5.5000 ± 0.5000 (3) | +0.0000 | 100.00 % |" in text
    assert "| sign | 0.02 | 4.5000 ± 0.5000 (3) | -1.0000 | 0.44 % |" in text


def test_a_token_of_a_table_has_one_second_moment_whichever_way_the_table_lies():
    rng = np.random.default_rng(0)
    table = np.float32(rng.normal(size=(12, 4)) * np.arange(1, 13)[:, None])
    gradients = {"embed": jnp.asarray(table), "head": jnp.asarray(table.T)}
    rule = embedding_rules.by_token()
    steps, state = rule.update(gradients, rule.init(gradients))
    expected = table / np.sqrt(np.mean(table**2, axis=1, keepdims=True))
    np.testing.assert_allclose(steps["embed"], expected, rtol=1e-5)
    np.testing.assert_allclose(steps["head"], expected.T, rtol=1e-5)
    assert state.nu["embed"].size == state.nu["head"].size == 12
    np.testing.assert_allclose(embedding_rules.unit_tokens(gradients["head"]), expected.T, rtol=1e-5)


def test_a_step_layer_by_layer_is_timed_beside_the_ordinary_step(tmp_path, monkeypatch):
    monkeypatch.setattr(layerwise_time, "COMPILATIONS", 1)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # of the other tests
    arguments = ["--model", "tiny", "--batch", "2", "--seq", "8", "--rounds", "2", "--out", str(tmp_path)]
    layerwise_time.main([*arguments, "--optimizers", "optax.adamw", "--keep-every", "2"])
    ((setting, rows),) = settings_of(tmp_path / "layerwise_time.json").items()
    assert setting == "cpu, tiny, 2 × 8 tokens, inputs of every 2 layers"
    assert rows["optax.adamw"]["ratio"] > 0 < rows["optax.adamw"]["compile, ratio"]
    assert layerwise_time.table({"x": rows["optax.adamw"] | {"ratio": 1.5}})[-1].split(" | ")[3] == "1.500"


def test_the_pictures_of_steps_are_drawn_from_the_stored_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(step_pictures, "ROWS", 8)
    monkeypatch.setattr(step_pictures, "COLUMNS", 12)
    kept = {name: step_pictures.OPTIMIZERS[name] for name in ("adamw", "muon")}
    gum = (step_pictures.go.gum, {"rank": 2, "period": 2, "full_rank_fraction": 1 / 4})
    monkeypatch.setattr(step_pictures, "OPTIMIZERS", kept | {"gum": gum})
    places = ["--out", str(tmp_path), "--to", str(tmp_path / "pictures")]
    step_pictures.main(places, step_pictures.Sizes(steps=3, rates=(0.01,)))
    rows = json.loads((tmp_path / "step_pictures.json").read_text())["optimizers"]
    assert len(rows["gum"]["losses"]) == 4
    low, sampled = (np.array(found["singular_values"]) for found in rows["gum"]["steps"].values())
    assert (low > 1e-3).sum() == 2
    assert (sampled > 1e-3).sum() == 6
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert set(drawn) == {"gum.svg", "muon.svg"}
    step_pictures.main(["--pictures", "--optimizers", "gum", *places])
    assert (tmp_path / "pictures" / "gum.svg").read_bytes() == drawn["gum.svg"]
