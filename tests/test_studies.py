"""The benchmarks that search rates: which runs they do, in which order, and what they keep."""

import dataclasses
import json
import math
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

import gum_optax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import finetuning  # noqa: E402
import pretraining  # noqa: E402
import pretraining_report  # noqa: E402
import trainings  # noqa: E402

# The rate at which each optimizer of the fake runs is best.
BEST = {"adamw": 3e-3, "muon": 6e-3, "galore_muon": 1.5e-3, "gum": 3e-3, "gum, low variance": 3e-3}
OF_RANK = {4: 1 / 16, 12: 1 / 4, 48: 1}


class Never:
    came = False


def fake(done):
    """A run whose loss is known: least at the best rate of the matrices, and at 0.024 for the others."""

    def do(chosen, place):
        done.append(chosen)
        wanted = BEST.get(chosen.optimizer, 3e-3) * OF_RANK[chosen.rank]
        loss = abs(math.log(chosen.lr / wanted)) + abs(math.log(chosen.others_lr / 0.024))
        seed = 0.01 * chosen.seed + 0.1 * (chosen.optimizer == "muon")
        curve = {str(step): 1 + loss + seed + 1 - step / 4883 for step in range(500, 4884, 487)}
        return {"val_loss": 1 + loss + seed, "lr": chosen.lr, "validation": curve}

    return do


@pytest.fixture
def stored(tmp_path):
    return trainings.Runs(tmp_path / "found.json")


def test_the_study_of_pretraining_is_complete(stored, tmp_path):
    done = []
    base = pretraining.start("words")
    trainings.work(stored, lambda: pretraining.study(stored, base, 4883), fake(done), tmp_path, Never())
    assert len(done) == len(set(map(dataclasses.astuple, done))) == len(stored.all())
    # The embedding's rate comes first; then the long runs, of which two of three seeds wait for the ablation.
    assert [x.others_lr for x in done[:3]] == [0.048, 0.096, 0.024]
    assert {x.others_lr for x in done[4:]} == {0.024}
    long = [x for x in done if x.steps == 4883]
    assert [x.seed for x in long] == [0] * 7 + [1] * 7 + [2] * 7
    assert done[-14:] == long[7:]
    cell = [x for x in long if (x.rank, x.full_rank_fraction) == (12, 1 / 4)]
    rate = 3e-3 * OF_RANK[12]
    assert [(x.optimizer, x.seed, x.lr) for x in cell] == [("gum", seed, rate) for seed in range(3)]
    whole = [x for x in long if x not in cell]
    assert Counter(x.optimizer for x in whole) == dict.fromkeys(
        (*pretraining.COMPARED, "galore_muon, rotated"), 3
    )
    assert all(x.lr == BEST[x.optimizer.removesuffix(", rotated")] for x in whole)
    # The plane of rank and fraction, two seeds at the best rate of each cell.
    short = [x for x in done if x.steps == 977]
    gum = [x for x in short if x.optimizer == "gum" and x.period == 50]
    for rank in pretraining.RANKS:
        best = 3e-3 * OF_RANK[rank]
        for fraction in pretraining.FRACTIONS:
            cell = [x for x in gum if (x.rank, x.full_rank_fraction) == (rank, fraction)]
            assert Counter(x.seed for x in cell if x.lr == best) == {0: 1, 1: 1}
            assert {best / 2, 2 * best} <= {x.lr for x in cell if x.seed == 0}
    changed = [x for x in short if x.period != 50 or (", " in x.optimizer and x.optimizer not in BEST)]
    assert Counter((x.optimizer, x.period) for x in changed) == {
        **{(name, period): 2 for name in ("gum", "galore_muon") for period in (10, 200)},
        ("gum, exact SVD", 50): 2,
        ("gum, random subspace", 50): 2,
        ("galore_muon, restarted", 50): 2,
        ("galore_muon, rotated", 50): 2,
    }


def test_a_study_goes_on_where_it_stopped_and_keeps_settings_and_commit(stored, tmp_path):
    class Stop:
        came = False

    done, base, stop = [], pretraining.start("words"), Stop()
    do = fake(done)

    def stopped(chosen, place):
        stop.came = len(done) == 5
        return do(chosen, place)

    trainings.work(stored, lambda: pretraining.study(stored, base, 4883), stopped, tmp_path, stop)
    assert len(done) == 6
    first = stored.all()
    assert [r["settings"] for r in first] == list(map(dataclasses.asdict, done))
    assert all(len(r["commit"].rstrip("+")) >= 7 for r in first)
    trainings.work(stored, lambda: pretraining.study(stored, base, 4883), do, tmp_path, Never())
    assert len(done) == len(set(map(dataclasses.astuple, done)))
    assert stored.all()[:6] == first
    json.loads((tmp_path / "found.json").read_text())


def test_a_source_archive_has_the_version_in_place_of_a_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "ROOT", tmp_path)
    assert trainings.commit.__wrapped__() == f"version {gum_optax.__version__}"


def test_runs_that_are_older_than_a_setting_are_found(stored):
    """A setting that did not exist yet had its default."""
    chosen = pretraining.start("words")
    stored.add(chosen, {"val_loss": 3.0})
    text = json.loads(stored.path.read_text())
    del text["runs"][0]["settings"]["layerwise"]
    older = trainings.Runs(stored.path.with_name("older.json"))
    older.path.write_text(json.dumps(text))
    found = older.find(chosen)
    assert found is not None
    assert found["val_loss"] == 3.0
    assert older.find(dataclasses.replace(chosen, layerwise=True)) is None
    assert trainings.Search(chosen, "lr").tried(older) == {chosen.lr: 3.0}


def test_two_workers_do_each_run_once(stored, tmp_path):
    done, base = [], pretraining.start("words")

    def work():
        trainings.work(stored, lambda: pretraining.study(stored, base, 4883), fake(done), tmp_path, Never())

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(done) == len(set(map(dataclasses.astuple, done))) == len(stored.all())


def test_the_report_has_intervals_tokens_and_changes(stored, tmp_path, capsys):
    base = pretraining.start("words")
    trainings.work(stored, lambda: pretraining.study(stored, base, 4883), fake([]), tmp_path, Never())
    stored.path.rename(tmp_path / "pretraining.json")
    costs = {name: {"step_ms": 100.0, "state_mib": 2.0} for name in pretraining.COMPARED}
    (tmp_path / "pretraining_costs.json").write_text(json.dumps(costs))
    pretraining_report.main(["--out", str(tmp_path)])
    table = (tmp_path / "pretraining.md").read_text().splitlines()
    # Seeds 0.01 apart: t = 4.303, sd = 0.01, three seeds.
    assert table[2] == "| `adamw` | 0.003 | 1.0100 ± 0.0248 (3) |  |  | 100 ms | 2.0 |"
    assert "| +0.1000 ± 0.0000 | not reached | 100 ms |" in table[3]
    # The curve of GUM is AdamW's, which reaches its own final loss at its end.
    assert "| +0.0000 ± 0.0000 | 5.00M tokens |" in table[5]
    ablation = (tmp_path / "ablation.md").read_text()
    # In each of four layers four matrices of 192 x 192 and three of 192 x 512.
    numbers = 4 * (4 * (192 + 192) + 3 * (192 + 512)) * 4
    slots = {"0.0": (0, 0), "0.0625": (1, 1), "0.25": (4, 3)}  # of 16 and of 12 blocks
    mib = [4 * (numbers + 192 * 192 * a + 192 * 512 * b) / 2**20 for a, b in slots.values()]
    cells = [f"1.0050 (2) at 0.0001875, {x:.2f} MiB" for x in mib]
    assert f"| 4 of 192 | {' | '.join(cells)} |" in ablation
    assert "| `gum` | exact SVD | 1.0050 (2) | +0.0000 |" in ablation
    assert "| `galore_muon` | restarted | 1.6981 (2) | +0.6931 |" in ablation
    assert "| `gum` | period 200 |" in ablation
    assert "| `gum` | period 50 |" not in ablation
    assert (tmp_path / "pretraining.png").stat().st_size > 10_000


def test_tokens_to_a_loss_lie_on_the_line_between_evaluations():
    settings = pretraining.start("words")
    curve = {"100": 3.0, "200": 2.0, "300": 1.0}
    group = pretraining_report.Group("gum", settings, [{"val_loss": 1.0, "validation": curve}])
    assert pretraining_report.reached(group, 1.5) == 250 * 1024
    assert pretraining_report.reached(group, 3.5) == 100 * 1024
    assert pretraining_report.reached(group, 0.5) is None


def test_a_search_ends_between_two_worse_neighbours():
    assert trainings.next_rates({}, 0.5) == [0.5]
    assert trainings.next_rates({0.5: 1.0}, 0.5) == [1.0, 0.25]
    assert trainings.next_rates({0.5: 1.0, 1.0: 2.0}, 0.5) == [0.25]
    assert trainings.next_rates({0.5: 1.0, 1.0: 0.5}, 0.5) == [2.0]
    assert trainings.next_rates({0.5: 1.0, 1.0: 0.5, 2.0: 0.7}, 0.5) == []


def test_the_study_of_fine_tuning_is_complete(stored, tmp_path, monkeypatch):
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 9,
        "vocab_size": 300,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(finetuning, "RANK", 8)
    done = []

    def do(chosen, place):
        done.append(chosen)
        loss = abs(math.log2(chosen.lr / finetuning.START[chosen.optimizer]))
        found = {"val_loss": loss, "lr": chosen.lr, "state_mib": 1.0, "peak_step_mib": 2.0}
        return found | ({"right": 3, "of": 64} if chosen.seed else {})

    trainings.work(stored, lambda: finetuning.study(stored, tmp_path, "sums"), do, tmp_path, Never())
    rows = {(name, 8 * per_head): 5 for name, per_head in finetuning.ROWS}
    assert Counter((x.optimizer, x.head_dim) for x in done) == rows
    assert Counter(x.seed for x in done) == {0: 30, 1: 10, 2: 10}
    assert {x.lora_rank > 0 for x in done if x.optimizer == "lora"} == {True}
    lines = finetuning.table(stored, tmp_path, "sums").splitlines()
    of_adamw, of_muon = (line.split("|")[1:-1] for line in lines[2:4])
    wanted = ["`adamw`", "9.38e-05", "0.0000 ± 0.0000 (3)", "", "6 of 128 (2.2 to 9.8 %)", "1.0", "2"]
    assert [cell.strip() for cell in of_adamw] == wanted
    assert of_muon[3].strip() == "+0.0000 ± 0.0000"
    assert len(lines) == 2 + len(finetuning.ROWS)
    assert lines[-1].startswith("| `muon, high pass`, each head |")
