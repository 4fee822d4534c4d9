"""Runs the examples as a user runs them."""

import dataclasses
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "benchmarks"))

import corpus  # noqa: E402
import corpus_comparison  # noqa: E402
import distributed  # noqa: E402
import helpers  # noqa: E402
import linear_regression  # noqa: E402
import llama  # noqa: E402
import optimizers  # noqa: E402
import pretrain  # noqa: E402
import training  # noqa: E402
import trainings  # noqa: E402

pytestmark = pytest.mark.usefixtures("example_environment")

TINY = [
    "--model",
    "tiny",
    "--batch",
    "2",
    "--seq",
    "16",
    "--period",
    "4",
    "--eval-every",
    "10",
    "--seed",
    "3",
]


def environment_of(cache):
    """The environment of a separate process with this cache."""
    return os.environ | {"XDG_CACHE_HOME": str(cache)}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small language of sentences over a fixed grammar."""
    rng = np.random.default_rng(0)
    who, what, where = (
        ["the cat", "a dog", "my friend"],
        ["sees", "likes", "finds"],
        ["the sea", "a tree", "rain"],
    )
    sentences = [f"{rng.choice(who)} {rng.choice(what)} {rng.choice(where)}." for _ in range(2000)]
    path = tmp_path_factory.mktemp("text") / "grammar.txt"
    path.write_text("\n\n".join(" ".join(sentences[i : i + 8]) for i in range(0, 2000, 8)))
    return path


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory):
    return [(r["step"], r["train_loss"], r.get("val_loss")) for r in records(directory)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text, cache):
    """The directory and output of one uninterrupted run of 30 steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), *TINY, "--steps", "30"]
    environment = environment_of(cache)
    done = subprocess.run(
        [*command, "--text", str(text), "--out", str(out)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return out, done


def test_a_run_leaves_metrics_plot_sample_table_and_checkpoints(whole):
    out, done = whole
    lines = records(out)
    assert [r["step"] for r in lines] == list(range(1, 31))
    assert [r["tokens"] for r in lines] == [32 * step for step in range(1, 31)]
    assert [r["step"] for r in lines if "val_loss" in r] == [10, 20, 30]
    assert {"train_loss", "seconds", "captured_energy", "residual_share", "refresh_count"} <= set(lines[0])
    assert lines[-1]["refresh_count"] == 8
    assert np.all(np.diff([r["seconds"] for r in lines]) > 0)
    assert (
        lines[-1]["val_loss"] < lines[0]["train_loss"] - 1
    )  # the grammar has few words, so a model learns it quickly
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "A sample of gum:" in done.stdout
    table = done.stdout.splitlines()[-3:]
    assert table[0].split("  ")[0].strip() == "optimizer"
    row = json.loads((out / "summary.json").read_text())
    assert f"{row['val_loss']:.4f}" in table[1]
    assert row["val_loss"] == lines[-1]["val_loss"]
    assert row["peak_step_mib"] > row["state_mib"] > 0
    assert "tok/s" in done.stderr  # the progress bar
    assert (out / "checkpoints" / "30").is_dir()


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGINT, signal.SIGKILL))],
    ids=lambda n: n.name,
)
def test_a_stopped_run_goes_on_to_the_bit_within_a_period(whole, text, tmp_path, cache, number):
    """SIGTERM and Ctrl-C save the current step; SIGKILL leaves the last regular save."""
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), *TINY, "--steps", "30"]
    command += ["--text", str(text), "--out", str(out), "--save-every", "5"]
    environment = environment_of(cache)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    # Send SIGKILL after the save of step 5, the other signals as soon as there is a step to save.
    sign = out / "checkpoints" / "5" if number == signal.SIGKILL else out / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not (sign.exists() and records(out)):
        time.sleep(0.002)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=120)
    stopped = len(losses(out))
    if number != signal.SIGKILL:
        assert process.returncode == 0, errors
        assert "stopping after the next step, with a checkpoint; a second Ctrl-C stops at once" in errors
        assert f"Stopped and saved at step {stopped} of 30" in printed
    assert 0 < stopped < 30
    assert pretrain.main([*TINY, "--steps", "30", "--text", str(text), "--out", str(out), "--resume"]) == 0
    assert losses(out) == losses(whole[0])


def test_resume_within_a_period_from_an_earlier_checkpoint_forgets_later_metrics(
    whole, text, tmp_path, capsys
):
    """As after a crash, the newest checkpoint is older than the last line, and that line is incomplete."""
    arguments = [*TINY, "--steps", "30", "--text", str(text), "--out", str(tmp_path / "run")]
    stop = iter(range(40))

    class StopAfterTen(training.StopSignal):
        @property
        def came(self):
            return next(stop) >= 10

        @came.setter
        def came(self, value):
            pass

    original, pretrain.StopSignal = pretrain.StopSignal, StopAfterTen
    try:
        assert pretrain.main(arguments) == 0
    finally:
        pretrain.StopSignal = original
    assert "Stopped and saved at step 10 of 30" in capsys.readouterr().out
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 11, "train_loss": 0.0, "seconds": 9.0, "tokens": 1}) + "\n")
        file.write('{"step": 12, "train_lo')
    assert pretrain.main([*arguments, "--resume"]) == 0
    assert losses(tmp_path / "run") == losses(whole[0])


def test_compare_starts_each_from_the_same_weights_on_the_same_data(text, tmp_path, capsys):
    out = tmp_path / "all"
    arguments = [*TINY, "--steps", "3", "--text", str(text), "--out", str(out)]
    # One optimizer of each family; another test, without compilation, runs every optimizer on the model.
    names = ["adamw", "muon", "gum"]
    assert pretrain.main([*arguments, "--compare", ",".join(names)]) == 0
    first = {name: records(out / name)[0]["train_loss"] for name in names}
    assert len(set(first.values())) == 1
    last = {name: records(out / name)[-1]["train_loss"] for name in names}
    assert len(set(last.values())) == len(names)
    rows = json.loads((out / "summary.json").read_text())
    assert [row["optimizer"] for row in rows] == names
    state = {row["optimizer"]: row["state_mib"] for row in rows}
    assert state["gum"] < state["muon"] < state["adamw"]
    assert (out / "loss.png").exists()
    assert "tokens/s" in capsys.readouterr().out
    # A comparison resumes too: it reads finished runs and does not train them again.
    lines = (out / "gum" / "metrics.jsonl").read_text()
    assert pretrain.main([*arguments, "--compare", "muon,gum", "--resume"]) == 0
    assert (out / "gum" / "metrics.jsonl").read_text() == lines


MISTAKES = [
    (["--text", "nowhere.txt"], "There is no text file nowhere.txt."),
    (["--text", "short.txt"], "The text is too short: "),
    (["--text", "empty.txt"], "The text file empty.txt is empty."),
    (["--text", "binary.txt"], "The text file binary.txt can't be read as UTF-8"),
    (["--text", "damaged.txt.xz"], "The text file damaged.txt.xz can't be read as UTF-8"),
    (["--text", "cut.txt.xz"], "The text file cut.txt.xz can't be read as UTF-8"),
    (["--resume"], "--resume needs the directory of the run"),
    (["--resume", "--out", "new"], "There is no run in new to resume"),
    (["--out", "held"], "held holds other files; give a new directory as --out."),
    (["--out", "other"], "steps=7 (asked 30); repeat its options to go on with it, or"),
    (["--out", "other", "--steps", "7"], "holds this run already; add --resume to go on"),
    (
        ["--compare", "adamw,gum", "--out", "other"],
        "other holds a single run; give a new",
    ),
    (["--out", "short.txt"], "short.txt holds other files"),
    (["--out", "short.txt/run"], "short.txt/run can't be used"),
    (["--out", "damaged"], "damaged/settings.json is damaged; give a new directory as --out."),
    (["--optimizer", "adamm"], "invalid choice: 'adamm'"),
    (
        ["--compare", "adamw,sgd"],
        "must be different names out of adamw, muon, normuon, galore_muon, gum, ",
    ),
    (["--steps", "0"], "argument --steps: must be a whole number of at least 1, got 0"),
    (["--lr", "-1"], "argument --lr: must be a positive number, got -1"),
    (["--lr", "quick"], "argument --lr: must be a positive number, got quick"),
    (["--full-rank-fraction", "2"], "argument --full-rank-fraction: must be between 0 and 1, got 2"),
    (["--rank", "1.5"], "argument --rank: must be a whole number of at least 1, got 1.5"),
]


@pytest.mark.parametrize(
    ("arguments", "sentence"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_a_mistake_is_answered_with_one_clear_sentence(
    text, tmp_path, monkeypatch, capsys, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    Path("empty.txt").write_text(" \n\n ")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    Path("damaged.txt.xz").write_text("not compressed")
    Path("cut.txt.xz").write_bytes(lzma.compress(b"words " * 1000)[:-20])
    Path("held").mkdir()
    Path("damaged").mkdir()
    Path("damaged/settings.json").write_text('{"optim')
    Path("held/file").touch()
    Path("other").mkdir()
    options = pretrain.parser().parse_args([*TINY, "--steps", "7"])
    words = corpus.Corpus(text, 512)
    settings = pretrain.settings_of(options, "gum", words)
    Path("other/settings.json").write_text(json.dumps(dataclasses.asdict(settings)))
    given = arguments if "--text" in arguments else ["--text", str(text), *arguments]
    try:
        code = pretrain.main([*TINY, "--steps", "30", *given])
    except SystemExit as stopped:  # argparse's own exit
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_a_text_is_encoded_once_and_decodes_to_itself(text):
    a, b = corpus.Corpus(text, 512), corpus.Corpus(text, 512)
    assert a.train.tolist() == b.train.tolist()
    assert a.train.filename == b.train.filename  # the second run reads the files of the first
    paragraph = text.read_text().split("\n\n")[1]
    assert paragraph in a.tokenizer.decode(a.train[:200].tolist())


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_documents_are_parted_by_record_separators_or_by_blank_lines(newline, tmp_path):
    parts = [f"The first line of {i}{newline}and the second" for i in range(20)]
    plain, packed = tmp_path / "plain.txt", tmp_path / "packed.txt.xz"
    plain.write_bytes(f"{newline}{newline}".join(parts).encode())
    # A blank line inside a document does not split it.
    packed.write_bytes(lzma.compress("\x1e".join(f"{part}{newline}{newline}end" for part in parts).encode()))
    wanted = [part.replace(newline, "\n") for part in parts]
    assert corpus.documents_of(plain) == wanted
    assert corpus.documents_of(packed) == [f"{part}\n\nend" for part in wanted]


def test_batches_are_an_epochs_windows_each_once_and_depend_on_seed_and_step_only(text):
    words = corpus.Corpus(text, 512)
    length, batch = 64, 3
    windows = (len(words.train) - 1) // length
    steps = -(-windows // batch)
    seen = [words.batch(step, batch=batch, length=length, seed=1) for step in range(steps)]
    starts = {tuple(row) for rows in seen for row in rows}
    assert len(starts) >= windows - 1
    again = words.batch(1, batch=batch, length=length, seed=1)
    np.testing.assert_array_equal(again, seen[1])
    assert (words.batch(1, batch=batch, length=length, seed=2) != seen[1]).any()


def test_the_default_text_is_real_conversation():
    documents = corpus.conversations()
    assert len(documents) > 7000
    assert sum(map(len, documents)) > 12e6
    assert re.search(r"\bhow are you\b", documents[0].lower())


def test_galore_muon_stalls_on_the_noisy_regression_and_gum_converges(tmp_path):
    """The paper's Figure 1 at full length."""
    losses = linear_regression.main(["--seeds", "4", "--out", str(tmp_path)])
    start = losses["GaLore-Muon"][0]
    np.testing.assert_allclose(losses["GaLore-Muon"][-1], start, rtol=1e-3)  # no movement at all
    for name in ("Muon", "GUM", "GUM, low variance"):
        assert (losses[name][-1] < 1e-6).all(), name
    assert (tmp_path / "linear_regression.png").exists()


def test_the_program_knows_every_optimizer():
    assert set(optimizers.OPTIMIZERS) == {"adamw", *helpers.OPTIMIZERS}


@pytest.mark.parametrize("name", ["adamw", *helpers.CORE_AND_LONG])
def test_each_optimizer_takes_the_models_parameters(name):
    options = pretrain.parser().parse_args(TINY)
    model = llama.Llama(llama.SIZES["tiny"], dtype=jnp.float32, rngs=nnx.Rngs(0))
    params = jax.eval_shape(lambda: nnx.split(model, nnx.Param)[1])

    class Words:
        name = "words"

    tx = optimizers.optimizer(pretrain.settings_of(options, name, Words()))
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_the_comparison_searches_the_best_rate_and_does_only_what_is_missing(tmp_path, monkeypatch):
    calls = []

    def fake_run(words, settings, place, stop, trainer):
        calls.append((settings.optimizer, settings.lr, settings.seed))
        loss = abs(np.log(settings.lr / 3e-3)) + 0.01 * settings.seed + len(settings.optimizer)
        return dataclasses.asdict(settings) | {"val_loss": loss, "validation": {"300": loss}}

    class Words:
        name = "words"

    def fake_costs(words, results, names):
        cost = {"state_mib": 1.0, "peak_step_mib": 2.0, "step_ms": 1.0, "tokens_per_second": 1024.0}
        results.data["costs"] |= dict.fromkeys(names, cost)

    monkeypatch.setattr(corpus_comparison, "run", fake_run)
    monkeypatch.setattr(corpus_comparison, "costs", fake_costs)
    monkeypatch.setattr(corpus_comparison, "Corpus", lambda *_: Words())
    monkeypatch.setitem(corpus_comparison.MAKERS, "adamw", (None, 6e-3))
    monkeypatch.setitem(corpus_comparison.MAKERS, "gum", (None, 1e-3))
    arguments = ["corpus_comparison.py", "--optimizers", "adamw;gum", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    corpus_comparison.main()
    # The search goes on until both neighbours of the best rate are worse, then runs the other seeds.
    down = [0.006, 0.012, 0.003, 0.0015]
    up = [0.00075, 0.0015, 0.003, 0.006]
    assert calls == [
        *(("adamw", lr, 0) for lr in down), ("adamw", 0.003, 1), ("adamw", 0.003, 2),
        *(("gum", lr, 0) for lr in up), ("gum", 0.003, 1), ("gum", 0.003, 2),
    ]  # fmt: skip
    table = (tmp_path / "comparison.md").read_text()
    assert "| `adamw` | 0.003 | 5.0100 ± 0.0100 | 1.0 | 2.0 | 1024 |" in table
    stored = json.loads((tmp_path / "comparison.json").read_text())
    stored["runs"].pop(3)
    (tmp_path / "comparison.json").write_text(json.dumps(stored))
    calls.clear()
    corpus_comparison.main()
    assert calls == [("adamw", 0.0015, 0)]
    # A file that is older than a setting had its default.
    del stored["protocol"]["layerwise"]
    (tmp_path / "comparison.json").write_text(json.dumps(stored))
    calls.clear()
    corpus_comparison.main()
    assert calls == [("adamw", 0.0015, 0)]
    stored["protocol"]["period"] = 7
    (tmp_path / "comparison.json").write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match="another protocol"):
        corpus_comparison.main()


def test_a_stopped_run_of_a_benchmark_goes_on_to_the_bit(text, tmp_path):
    words = corpus.Corpus(text, 512)
    options = pretrain.parser().parse_args([*TINY, "--steps", "12"])
    # Bits of the rounding are among what a resumed run draws again.
    chosen = dataclasses.replace(
        pretrain.settings_of(options, "sinkgd", words), weights_dtype="bfloat16", others="adafactor"
    )

    class Stop:
        """A signal that is set after a number of queries."""

        def __init__(self, after):
            self.after = after

        @property
        def came(self):
            self.after -= 1
            return self.after < 0

    whole = trainings.run(words, chosen, tmp_path / "whole", Stop(100), evaluate_every=5)
    assert trainings.run(words, chosen, tmp_path / "cut", Stop(7), evaluate_every=5) is None
    assert trainings.run(words, chosen, tmp_path / "cut", Stop(100), evaluate_every=5) == whole
    assert sorted(whole["validation"]) == [5, 10, 12]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--microbatches", "2"], "--microbatches is for --parallel projected or --layerwise, not fsdp"),
        (["--parallel", "projected", "--layerwise"], "--layerwise is for --parallel fsdp or data"),
        (
            ["--parallel", "projected", "--batch", "3", "--microbatches", "2"],
            "must be a multiple of 2",
        ),
        (["--out", __file__], "is a file; give a new directory as --out"),
    ],
)
def test_the_script_for_many_devices_says_what_does_not_fit(arguments, message, capsys):
    assert distributed.main(["--out", "none", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_layer_by_layer_the_losses_are_the_same_and_a_run_resumes_bit_for_bit(
    text, tmp_path, dtype, tolerance
):
    """Without clipping, which sees one layer at a time there; over two refreshes, and a stop between.

    Of weights in bfloat16 a rounding of the step decides which way some are rounded.
    """
    arguments = [*TINY, "--steps", "12", "--clip", "0", "--text", str(text), "--weights-dtype", dtype]
    assert pretrain.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    by_layer = [*arguments, "--layerwise", "--save-every", "5", "--out", str(tmp_path / "by_layer")]
    assert pretrain.main(by_layer) == 0
    found = losses(tmp_path / "by_layer")
    by_layer_losses, whole_losses = (
        [r["train_loss"] for r in records(tmp_path / name)] for name in ("by_layer", "whole")
    )
    np.testing.assert_allclose(by_layer_losses, whole_losses, rtol=tolerance)
    shutil.rmtree(tmp_path / "by_layer" / "checkpoints" / "12")
    assert pretrain.main([*by_layer, "--resume"]) == 0
    assert losses(tmp_path / "by_layer") == found
