"""Tables and pictures of the runs of `pretraining.py`.

    python benchmarks/pretraining_report.py
    python benchmarks/pretraining_report.py --costs --text corpus.txt.xz

Reads `docs/results/pretraining.json` and writes `pretraining.md`, `ablation.md` and `pretraining.png` beside
it. `--costs` first measures the time of a step, round-robin in one process on an otherwise idle machine.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx
from results import RESULTS, beside, mean_and_interval

from pretraining import (
    BATCH,
    COMPARED,
    FRACTIONS,
    LONG,
    RANKS,
    SEEDS,
    SEQ,
    StudyTrainer,
    at_full_length,
    factors,
    searches,
    start,
)
from trainings import Record, Runs, Search, step_seconds

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Importing `trainings` put the examples on the path.
from corpus import Corpus  # isort: skip
from llama import SIZES, Llama  # isort: skip
from optimizers import Settings, optimizer  # isort: skip

ROUNDS, STEPS_A_ROUND = 9, 5
COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2")  # Okabe and Ito's


class Group(NamedTuple):
    """The runs of one choice over its seeds."""

    name: str
    settings: Settings
    runs: list[Record]  # in the order of the seeds

    @property
    def losses(self) -> list[float]:
        return [r["val_loss"] for r in self.runs]

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and the validation losses of each seed, `(seeds, evaluations)`."""
        steps = [int(step) for step in self.runs[0]["validation"]]
        losses = [list(r["validation"].values()) for r in self.runs]
        return np.array(steps) * self.settings.batch * self.settings.seq, np.array(losses)


def reached(group: Group, loss: float) -> float | None:
    """The tokens after which the mean validation loss is at most `loss`, between evaluations by a line."""
    tokens, losses = group.curve()
    mean = losses.mean(0)
    below = np.flatnonzero(mean <= loss)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(tokens[0])
    part = (mean[i - 1] - loss) / (mean[i - 1] - mean[i])
    return float(tokens[i - 1] + part * (tokens[i] - tokens[i - 1]))


def found(runs: Runs, name: str, chosen: Settings, seeds: Sequence[int]) -> Group | None:
    """The finished runs of some settings."""
    records = [r for seed in seeds if (r := runs.find(replace(chosen, seed=seed)))]
    return Group(name, chosen, records) if records else None


class Study(NamedTuple):
    """The searches that are done, and the settings at the best rates."""

    runs: Runs
    all_searches: list[Search]

    def best(self, **wanted: Any) -> Settings | None:
        """The best settings of the search with these settings."""
        for search in self.all_searches:
            if all(getattr(search.start, name) == value for name, value in wanted.items()):
                return search.best(self.runs)
        return None


def study_of(runs: Runs, text: str) -> Study:
    others = Search(start(text), "others_lr").best(runs)
    return Study(runs, searches(replace(others, lr=start(text).lr)) if others else [])


def long_groups(study: Study) -> list[Group]:
    bests = at_full_length(study.all_searches, study.runs).items()
    groups = (found(study.runs, name, replace(best, steps=LONG), SEEDS) for name, best in bests)
    return [group for group in groups if group]


def long_table(groups: list[Group], costs: dict[str, Any]) -> Iterator[str]:
    heads = ("optimizer", "learning rate", "validation loss", "beyond AdamW", "AdamW's loss after", "step")
    yield f"| {' | '.join(heads)} | state MiB |"
    yield "|---" * 7 + "|"
    adamw = next((group for group in groups if group.name == "adamw"), None)
    for group in groups:
        gap = after = ""
        if adamw and group is not adamw:
            gap = beside(group.losses, adamw.losses)
            tokens = reached(group, statistics.fmean(adamw.losses))
            after = f"{tokens / 1e6:.2f}M tokens" if tokens else "not reached"
        cost = costs.get(group.name)
        step, state = (f"{cost['step_ms']:.0f} ms", f"{cost['state_mib']:.1f}") if cost else ("", "")
        loss = f"{mean_and_interval(group.losses)} ({len(group.runs)})"
        yield f"| `{group.name}` | {group.settings.lr:g} | {loss} | {gap} | {after} | {step} | {state} |"


def state_of_matrices(chosen: Settings) -> float:
    """MiB of the optimizer's state without that of embedding, head and norms."""
    alone = replace(chosen, others="frozen", clip=0.0)
    model = nnx.eval_shape(lambda: Llama(SIZES[chosen.model], dtype=jnp.float32, rngs=nnx.Rngs(0)))
    state = jax.eval_shape(optimizer(alone).init, nnx.state(model, nnx.Param))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 2**20


def plane(study: Study) -> Iterator[str]:
    """Rank by fraction: the mean loss of the seeds at the best rate, that rate, and the state."""
    yield "| rank | " + " | ".join(f"q = {q:g}" for q in FRACTIONS) + " |"
    yield "|---" * (len(FRACTIONS) + 1) + "|"
    for rank in RANKS:
        cells = []
        for fraction in FRACTIONS:
            best = study.best(optimizer="gum", rank=rank, full_rank_fraction=fraction)
            group = found(study.runs, "", best, SEEDS[:2]) if best else None
            if group:
                loss, state = statistics.fmean(group.losses), state_of_matrices(group.settings)
                cells.append(f"{loss:.4f} ({len(group.runs)}) at {group.settings.lr:g}, {state:.2f} MiB")
            else:
                cells.append("")
        yield f"| {rank} of 192 | " + " | ".join(cells) + " |"


def factor_table(study: Study) -> Iterator[str]:
    """One thing changed at a time, beside the unchanged optimizer with the same seeds."""
    yield "| optimizer | change | validation loss (seeds) | beyond unchanged |"
    yield "|---|---|---|---|"
    bests = {name: best for name in COMPARED if (best := study.best(optimizer=name))}
    if len(bests) < len(COMPARED):
        return
    changed = [*factors(bests), bests["gum, low variance"]]
    for chosen in sorted(changed, key=lambda s: (s.optimizer.split(", ")[0] != "gum", s.optimizer, s.period)):
        name, _, change = chosen.optimizer.partition(", ")
        unchanged = found(study.runs, name, bests[name], SEEDS[:2])
        group = found(study.runs, name, chosen, SEEDS[:2])
        if group and unchanged and chosen != bests[name]:
            change = change or f"period {chosen.period}"
            gap = statistics.fmean(a - b for a, b in zip(group.losses, unchanged.losses, strict=False))
            loss = f"{statistics.fmean(group.losses):.4f} ({len(group.runs)})"
            yield f"| `{name}` | {change} | {loss} | {gap:+.4f} |"


def measure_costs(study: Study, corpus: Corpus) -> dict[str, Any]:
    """Time of a step, and state."""
    bests = at_full_length(study.all_searches, study.runs)
    trainers = {name: StudyTrainer(best, corpus) for name, best in bests.items()}
    seconds = step_seconds(trainers, ROUNDS, STEPS_A_ROUND)
    return {
        name: {
            "step_ms": 1000 * seconds[name],
            "state_mib": trainer.optimizer_bytes() / 2**20,
        }
        for name, trainer in trainers.items()
    }


def draw(groups: list[Group], costs: dict[str, Any], path: Path) -> None:
    """Validation losses over tokens and over seconds: means of the seeds, in bands from least to greatest."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for group, colour in zip(groups, COLOURS, strict=False):
        tokens, losses = group.curve()
        scales = [(axes[0], 1e-6)]
        if cost := costs.get(group.name):
            scales.append((axes[1], cost["step_ms"] / 1000 / (BATCH * SEQ)))
        for place, scale in scales:
            place.plot(tokens * scale, losses.mean(0), color=colour, label=group.name, linewidth=1.4)
            place.fill_between(tokens * scale, losses.min(0), losses.max(0), color=colour, alpha=0.2)
    axes[0].set(xlabel="tokens (millions)", ylabel="validation loss (nats per token)", title="over tokens")
    axes[1].set(xlabel="seconds of training steps", title="over time")
    lowest = min(group.curve()[1].min() for group in groups)
    axes[0].set_ylim(lowest - 0.05, lowest + 1.2)
    for place in axes:
        place.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--costs", action="store_true", help="measure the time of a step")
    p.add_argument("--text", type=Path, help="for --costs; default: chitchat-dataset")
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    runs, file = Runs(options.out / "pretraining.json"), options.out / "pretraining_costs.json"
    if not runs.all():
        raise SystemExit(f"{runs.path} holds no runs.")
    study = study_of(runs, runs.all()[0]["settings"]["text"])
    if options.costs:
        corpus = Corpus(options.text, SIZES[runs.all()[0]["settings"]["model"]].vocabulary)
        file.write_text(json.dumps(measure_costs(study, corpus), indent=1) + "\n")
    costs = json.loads(file.read_text()) if file.exists() else {}
    groups = long_groups(study)
    (options.out / "pretraining.md").write_text("\n".join(long_table(groups, costs)) + "\n")
    ablation = ["Rank and fraction:", "", *plane(study), "", "One thing changed:", "", *factor_table(study)]
    (options.out / "ablation.md").write_text("\n".join(ablation) + "\n")
    if groups:
        draw(groups, costs, options.out / "pretraining.png")
    print((options.out / "pretraining.md").read_text(), (options.out / "ablation.md").read_text(), sep="\n")


if __name__ == "__main__":
    main()
