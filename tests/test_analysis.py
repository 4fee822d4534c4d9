"""Tests examples/analysis.py: its measures against other formulas, and itself on tiny runs."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import nnx

import gum_optax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import analysis  # noqa: E402
import finished_runs  # noqa: E402
import llama  # noqa: E402
import measures  # noqa: E402
import pretrain  # noqa: E402
import run_groups  # noqa: E402

pytestmark = pytest.mark.usefixtures("example_environment")

TINY = ["--model", "tiny", "--batch", "2", "--seq", "16", "--period", "4", "--eval-every", "10"]


# The measures.


def test_an_orthogonal_matrix_has_full_stable_rank_and_a_product_of_vectors_has_one(rng):
    q, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    flat, peak = (
        measures.singular_values(w) for w in (q, np.outer(rng.normal(size=16), rng.normal(size=24)))
    )
    assert np.allclose([measures.stable_rank(flat), measures.stable_rank(peak)], [16, 1])
    assert np.allclose([measures.uniformity(flat), measures.uniformity(peak)], [1, 1 / 16])
    assert np.allclose([measures.tail_share(flat), measures.tail_share(peak)], [3 / 4, 0])


def test_the_stable_rank_is_the_ratio_of_two_norms_at_any_scale(rng):
    w = rng.normal(size=(12, 20))
    norms = np.linalg.norm(w) ** 2 / np.linalg.norm(w, 2) ** 2
    assert np.isclose(measures.stable_rank(measures.singular_values(w)), norms)
    assert np.isclose(measures.stable_rank(measures.singular_values(1e-3 * w)), norms)


@pytest.mark.parametrize("equal", [1, 3, 8])
def test_some_equal_singular_values_among_zeros_have_their_share_as_uniformity(equal):
    s = np.zeros(8)
    s[:equal] = 5.0
    assert np.isclose(measures.uniformity(s), equal / 8)
    assert np.isclose(measures.uniformity(s) * 8, np.exp(scipy.stats.entropy(s**2)))


def test_a_matrix_of_zeros_has_no_rank():
    s = measures.singular_values(np.zeros((4, 6)))
    assert [measures.stable_rank(s), measures.uniformity(s), measures.tail_share(s)] == [0, 0, 0]
    assert not measures.quantiles(s, 3).any()


def test_quantiles_of_singular_values_begin_with_one_and_end_with_the_smallest():
    assert measures.quantiles(np.array([8.0, 6.0, 4.0, 2.0, 1.0]), 3).tolist() == [1, 1 / 2, 1 / 8]


@pytest.mark.parametrize(
    ("draw", "kurtosis", "eighth"),
    [("normal", 0.0, 24), ("laplace", 3.0, 2520 - 36), ("uniform", -1.2, 1.0)],
)
def test_the_kurtosis_is_that_of_the_distribution(draw, kurtosis, eighth, rng):
    x = getattr(rng, draw)(size=200_000)
    found = measures.excess_kurtosis(x)
    assert np.isclose(found, scipy.stats.kurtosis(x))
    assert abs(found - kurtosis) < 5 * np.sqrt(eighth / len(x))  # at most five standard errors
    assert np.isclose(measures.excess_kurtosis(jnp.asarray(3 * x + 1, jnp.float32)), found, atol=2e-3)


def test_the_largest_over_the_root_mean_square_is_one_for_signs_and_largest_for_a_single_number(rng):
    assert np.isclose(measures.max_over_rms(rng.choice([-2.0, 2.0], 100)), 1)
    assert np.isclose(measures.max_over_rms(np.eye(1, 100, 7)), 10)


def test_places_count_the_steps_since_the_last_refresh():
    places = measures.places_in_period(np.array([1, 1, 1, 2, 2, 3]))
    assert places.tolist() == [0, 1, 2, 0, 1, 0]
    assert measures.mean_by(places, np.array([1.0, 2, 3, 4, 5, 7])).tolist() == [4, 3.5, 3]


@pytest.mark.parametrize(
    ("trials", "probability"), [(5, 1 / 16), (98, 1 / 12), (20, 1 / 4), (40, 1.0), (3, 0.0)]
)
def test_the_binomial_interval_is_that_of_scipy(trials, probability):
    expected = scipy.stats.binom.ppf([0.025, 0.975], trials, probability)
    assert np.allclose(measures.binomial_interval(trials, probability), expected)


# The blocks of GUM.


def test_the_blocks_counted_at_full_rank_are_those_whose_steps_have_full_rank(rng):
    """The step of every other block has the rank of the subspace."""
    _, params = finished_runs.start_of("tiny", 0)
    rule = gum_optax.unbiased_low_rank(optax.identity(), 4, 1, 0.25, find_subspace=gum_optax.random_subspace)
    tx = gum_optax.matrix_optimizer(rule, 1.0, 1.0, others=optax.sgd(1.0))
    update = jax.jit(tx.update)
    state, records, seen = jax.jit(tx.init)(params), [], {}
    for step in (1, 2):
        gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
        updates, state = update(gradients, state, params)
        for name, x in finished_runs.named(updates).items():
            if name.startswith("layers") and x.ndim == 2:
                full = np.linalg.matrix_rank(np.asarray(x, np.float64), tol=1e-3 * np.abs(x).max()) > 4
                seen[name.removesuffix("/kernel")] = seen.get(name.removesuffix("/kernel"), 0) + int(full)
        records.append({"step": step} | {k: x.item() for k, x in gum_optax.metrics(state).items()})
    run = finished_runs.FinishedRun(Path("run"), {}, records)
    counts = analysis.full_rank(run, finished_runs.blocks_by_group(params))
    assert {name: own["count"] for name, own in counts.items()} == seen
    assert sum(own["count"] for own in counts.values()) == 2 * (2 + 2)
    assert {own["fraction"] for own in counts.values()} == {2 / 8, 2 / 6}


def test_layers_are_counted_as_numbers():
    """As words, layer 10 would come before layer 2."""
    size = dataclasses.replace(llama.SIZES["tiny"], layers=11, hidden=8, feed_forward=8, vocabulary=16)
    params = nnx.state(llama.Llama(size, dtype=jnp.float32, rngs=nnx.Rngs(0)), nnx.Param)
    (names,) = finished_runs.blocks_by_group(params).values()
    assert [int(name.split("/")[1]) for name in names] == [layer for layer in range(11) for _ in range(7)]


def test_leaves_of_a_run_layer_by_layer_have_the_names_of_the_model():
    """`layered.py` keeps the norm and the output layer in an entry `head`."""
    _, params = finished_runs.start_of("tiny", 0)
    head = {"norm": params["norm"], "lm_head": params["lm_head"]}
    divided = {"embed": params["embed"], "layers": params["layers"], "head": head}
    assert finished_runs.named(divided).keys() == finished_runs.named(params).keys()
    assert finished_runs.blocks_by_group(divided) == finished_runs.blocks_by_group(params)


# Groups of runs.


def _run(seed, loss, stable_rank):
    by_layer = np.array([stable_rank - 0.01, stable_rank + 0.01])
    of_kind = dict.fromkeys(["stable_rank_share", "uniformity", "tail_share"], by_layer)
    weights = dict.fromkeys(run_groups.KINDS, of_kind)
    return {"seed": seed, "val_loss": loss, "weights": weights, "full_rank": {}}


def _settings(optimizer, seed, lr, period=50, steps=10):
    return {"optimizer": optimizer, "lr": lr, "period": period, "steps": steps, "seed": seed}


def test_runs_that_differ_in_their_seed_are_one_group_and_labels_tell_groups_apart():
    runs = [
        (_settings("gum", 0, 1e-3), _run(0, 3.0, 0.3)),
        (_settings("gum", 1, 1e-3), _run(1, 5.0, 0.5)),
        (_settings("gum", 0, 1e-3, period=200), _run(0, 3.5, 0.2)),
        (_settings("muon", 0, 2e-3), _run(0, 2.0, 0.6)),
    ]
    groups = run_groups.grouped(runs)
    assert [group.label() for group in groups] == ["gum, K 50", "gum, K 200", "muon"]
    mean, spread = groups[0].mean("weights", "stable_rank_share", ["query"])
    assert np.isclose(mean, 0.4)
    assert np.isclose(spread, np.sqrt(0.02))
    assert groups[1].mean("weights", "stable_rank_share", ["query"])[1] is None


def test_optimizers_are_compared_at_their_best_rates_and_the_settings_that_most_of_them_share():
    runs = [
        (_settings("gum", 0, 1e-3), _run(0, 3.0, 0.3)),
        (_settings("gum", 1, 1e-3), _run(1, 3.0, 0.4)),
        (_settings("gum", 0, 9e-3), _run(0, 9.0, 0.9)),
        (_settings("gum", 0, 1e-3, period=200, steps=90), _run(0, 1.0, 0.1)),
        (_settings("muon", 0, 2e-3), _run(0, 2.0, 0.6)),
        (_settings("muon", 1, 2e-3), _run(1, 2.0, 0.6)),
    ]
    chosen = run_groups.compared(run_groups.grouped(runs))
    assert [(group.optimizer, group.settings["lr"]) for group in chosen] == [("gum", 1e-3), ("muon", 2e-3)]
    row = run_groups.claims(chosen)[0]
    assert (row["claim"], row["against"], row["kinds_higher"]) == ("higher stable rank", "muon", 0)
    assert np.isclose(row["difference"], -0.25)  # of pairs -0.3 and -0.2
    assert np.isclose(row["standard_error"], 0.05)


# Finished runs.


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "sees", "likes", "the", "a", "sea", "tree", "rain", "friend"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(" ".join(rng.choice(words, 40)) for _ in range(200)))
    return path


@pytest.fixture
def made(tmp_path_factory, text, cache, request):
    """A finished run of GUM and one of AdamW, made once."""
    out = cache / "runs"
    if not out.exists():
        arguments = [
            *TINY,
            "--steps",
            "10",
            "--full-rank-fraction",
            "0.25",
            "--text",
            str(text),
            "--out",
            str(out),
        ]
        assert pretrain.main([*arguments, "--compare", "gum,adamw"]) == 0
    return out


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_an_analysis_has_all_numbers_and_pictures_and_leaves_the_runs_as_they_are(
    made, text, tmp_path, capsys
):
    before = files_of(made)
    arguments = [str(made / "gum"), str(made / "adamw"), "--text", str(text), "--out", str(tmp_path)]
    assert analysis.main(arguments) == 0
    assert files_of(made) == before
    printed = capsys.readouterr().out
    for name in ("spectra", "singular_values", "singular_values_of_change", "activations", "full_rank"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for name in ("residual_in_period", "residual_by_refresh"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "analysis.json").read_text())
    adamw, gum = found["groups"]
    assert (adamw["label"], gum["label"], found["compared"]) == ("adamw", "gum", ["adamw", "gum"])
    records = [json.loads(line) for line in (made / "gum" / "metrics.jsonl").read_text().splitlines()]
    (run,) = gum["runs"]
    shares = [r["residual_share"] for r in records]
    assert np.allclose(run["residual_share"]["by_step"], shares, rtol=1e-4)
    by_place = [np.mean(shares[place::4]) for place in range(4)]
    assert np.allclose(run["residual_share"]["by_place"], by_place, rtol=1e-4)
    assert run["residual_share"]["by_refresh"]["step"] == [1, 5, 9]
    assert adamw["runs"][0]["residual_share"] is None
    assert adamw["full_rank"] == {}
    assert len(gum["full_rank"]) == 14
    assert sum(own["count"] for own in gum["full_rank"].values()) == 3 * (2 + 2)
    assert {kind: len(own["stable_rank"]) for kind, own in run["weights"].items()} == {
        **dict.fromkeys(run_groups.KINDS, 2), "embed": 1, "lm_head": 1,
    }  # fmt: skip
    assert np.isclose(
        np.mean(run["change"]["up"]["uniformity"]), gum["summary"]["change"]["up"]["uniformity"][0], rtol=1e-4
    )
    assert list(run["activations"]) == ["query, key, value", "out", "gate, up", "down", "lm_head"]
    assert {row["claim"] for row in found["claims"]} == set(run_groups.CLAIMS)
    assert "higher stable rank" in printed
    assert f"{records[-1]['val_loss']:.4f}" in printed


def test_the_inputs_of_linear_layers_are_measured_at_the_layers():
    """The first norm's output, computed apart, has the kurtosis that is said to enter the first query."""
    model = llama.Llama(llama.SIZES["tiny"], dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokens, found = jnp.arange(12).reshape(1, 12), {}
    entering = model.layers[0].attention_norm(model.embed(tokens))
    logits = model(tokens)
    finished_runs._watch(model, found)
    assert jnp.array_equal(model(tokens), logits)
    assert set(found) == {f"layers/{i}/{kind}" for i in range(2) for kind in run_groups.KINDS} | {"lm_head"}
    expected = scipy.stats.kurtosis(np.asarray(entering), axis=None)
    assert np.isclose(found["layers/0/query"]["kurtosis"], expected, rtol=1e-4)
    assert found["layers/0/query"] == found["layers/0/key"]


def _rewrite(run, change):
    """Write the metrics anew, the last record changed."""
    *lines, last = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines, *change(last)]) + "\n")


def _with_loss(record, loss):
    return json.dumps(json.loads(record) | {"val_loss": loss})


def _cut_arrays(run):
    for path in (run / "checkpoints").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])


DAMAGE = [
    (lambda run: (run / "settings.json").unlink(), "run is no run: it needs settings.json and metrics.jsonl"),
    (lambda run: (run / "settings.json").write_text("{}"), "run is no run of pretrain.py: its settings lack"),
    (lambda run: (run / "settings.json").write_text("{"), "The settings or the metrics in "),
    (lambda run: _rewrite(run, lambda last: []), "run is not finished: it is at step 9 of 10."),
    (lambda run: _rewrite(run, lambda last: ["{}", last]), "The settings or the metrics in "),
    (lambda run: _rewrite(run, lambda last: [last, last]), "The metrics in "),
    (lambda run: _rewrite(run, lambda last: [_with_loss(last, np.nan)]), "run diverged: its last validation"),
    (lambda run: shutil.rmtree(run / "checkpoints"), "run has no checkpoint of its last step, 10."),
    (_cut_arrays, "The checkpoint of step 10 in "),
    (
        lambda run: _rewrite(run, lambda last: [_with_loss(last, 1.0)]),
        "but the run ended with 1.0000: the checkpoint is damaged",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=range(len(DAMAGE)))
def test_a_run_that_cannot_be_read_is_answered_with_one_clear_sentence(
    damage, message, made, text, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(made / "adamw", run)
    damage(run)
    assert analysis.main([str(run), "--text", str(text), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_another_text_is_refused(made, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"sentence number {i} of another text" for i in range(300)))
    assert analysis.main([str(made / "adamw"), "--text", str(other)]) == 2
    assert "adamw was trained on words-" in capsys.readouterr().err


def test_unfinished_runs_are_left_out_when_asked(made, tmp_path, text, capsys, monkeypatch):
    monkeypatch.setattr(analysis, "draw_all", lambda groups, out: [])
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    arguments = ["--text", str(text), "--out", str(tmp_path / "out"), "--skip-unfinished"]
    assert analysis.main([str(nothing), str(made / "adamw"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"Left out: {nothing} is no run" in printed
    assert "no run of gum" in printed
    assert analysis.main([str(nothing), *arguments]) == 2
    assert "None of these runs can be analysed." in capsys.readouterr().err
