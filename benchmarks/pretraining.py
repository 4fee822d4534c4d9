"""Pretraining over five million tokens, and an ablation of GUM's parts over one million.

    python benchmarks/pretraining.py --text corpus.txt.xz

Does, one after the other, all runs that `docs/results/pretraining.json` lacks: the search of the embedding's
rate with AdamW, then of the matrices' rate for each optimizer, over one million tokens; one seed of each
optimizer over five million tokens; the ablation; then the other two seeds. Stopped (Ctrl-C, SIGTERM) and
started again, it continues an interrupted run bit for bit. Several processes may work at once, say one on
each core.

The directories of the runs, with their metrics and last weights, stay in `--runs`.
"""

import argparse
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from results import RESULTS

import gum_optax as go

from trainings import ROOT, Record, Runs, Search, run, work

# Importing `trainings` put the examples on the path.
from corpus import Corpus  # isort: skip
from llama import SIZES  # isort: skip
from optimizers import OPTIMIZERS, OTHERS_LR, Maker, Settings  # isort: skip
from training import StopSignal, Trainer  # isort: skip

MODEL, BATCH, SEQ = "3m", 8, 128
SHORT, LONG = 977, 4883  # steps: one and five million tokens
PERIOD, FRACTION = 50, 1 / 16
EVALUATIONS = 20  # of each run
SEEDS = (0, 1, 2)  # the first one searches; the ablation has the first two


def _changed(of: str, **changed: Any) -> tuple[Maker, float]:
    """An optimizer with other arguments."""
    make, rate = OPTIMIZERS[of]
    return functools.partial(make, **changed), rate


VARIANTS = {
    "gum, low variance": _changed("gum", compensation=go.low_variance),
    "gum, exact SVD": _changed("gum", find_subspace=go.svd_subspace),
    "gum, random subspace": _changed("gum", find_subspace=go.random_subspace),
    "galore_muon, restarted": _changed("galore_muon", on_refresh=go.restart),
    "galore_muon, rotated": _changed("galore_muon", on_refresh=go.rotate),
}
KNOWN = OPTIMIZERS | VARIANTS


def _of(variant: str) -> str:
    """The optimizer that a variant changes."""
    return variant.partition(", ")[0]


class StudyTrainer(Trainer):
    """A trainer that knows the variants."""

    makers = KNOWN


COMPARED = ("adamw", "muon", "galore_muon", "gum", "gum, low variance")
RANKS = (4, 12, 48)
FRACTIONS = (0.0, 1 / 16, 1 / 4)
LONG_CELL = (12, 1 / 4)  # of the plane, with less state than GaLore-Muon at rank 48: run at full length too
LONG_VARIANT = "galore_muon, rotated"  # the best of one thing changed in GaLore-Muon: at full length too
PERIODS = (10, 50, 200)


def start(text: str, model: str = MODEL, steps: int = SHORT) -> Settings:
    """AdamW's settings over the short length, where the searches start."""
    return Settings(
        optimizer="adamw",
        model=model,
        steps=steps,
        batch=BATCH,
        seq=SEQ,
        lr=OPTIMIZERS["adamw"][1],
        others_lr=OTHERS_LR / 2,  # a longer run than that of `OTHERS_LR` wants less
        rank=SIZES[model].rank,
        period=PERIOD,
        full_rank_fraction=FRACTION,
        weight_decay=0.1,
        seed=SEEDS[0],
        text=text,
    )


def searches(base: Settings) -> list[Search]:
    """The searches of the matrices' rate: for each optimizer, and for GUM at each rank and fraction."""

    def search(optimizer: str, **changed: Any) -> Search:
        return Search(replace(base, optimizer=optimizer, lr=KNOWN[optimizer][1], **changed), "lr")

    plane = itertools.product(RANKS, FRACTIONS)
    cells = [search("gum", rank=rank, full_rank_fraction=fraction) for rank, fraction in plane]
    return [*map(search, COMPARED), *(s for s in cells if s != search("gum"))]


def at_full_length(all_searches: Iterable[Search], runs: Runs) -> dict[str, Settings]:
    """What runs at full length, by the name of its row, as far as its search is done."""
    found = {}
    for search in all_searches:
        s, best = search.start, search.best(runs)
        if best and (s.rank, s.full_rank_fraction) == LONG_CELL:
            found[f"{s.optimizer}, rank {s.rank}, q = {s.full_rank_fraction:g}"] = best
        elif best and (s.rank, s.full_rank_fraction) == (SIZES[s.model].rank, FRACTION):
            found[s.optimizer] = best
    if plain := found.get(_of(LONG_VARIANT)):
        found[LONG_VARIANT] = replace(plain, optimizer=LONG_VARIANT)
    return found


def factors(best: dict[str, Settings]) -> Iterator[Settings]:
    """GUM and GaLore-Muon, at the best rate of each, with one thing changed."""
    for period in PERIODS:
        yield replace(best["gum"], period=period)
        yield replace(best["galore_muon"], period=period)
    for name in VARIANTS:
        if name not in COMPARED:
            yield replace(best[_of(name)], optimizer=name)


def study(runs: Runs, base: Settings, long: int) -> Iterator[Settings]:
    """The runs that can be done now, the most urgent first; some are done already."""
    others = Search(base, "others_lr")
    yield from others.wanted(runs)
    if (tuned := others.best(runs)) is None:
        return
    all_searches = searches(replace(tuned, lr=base.lr))
    compared, cells = all_searches[: len(COMPARED)], all_searches[len(COMPARED) :]
    yield from in_turns(search.wanted(runs) for search in compared)
    best = at_full_length(compared, runs)
    yield from (replace(chosen, steps=long) for chosen in best.values())  # the longest runs start first
    yield from in_turns(search.wanted(runs) for search in cells)
    chosen_for_length = at_full_length(all_searches, runs)
    yield from (replace(chosen, steps=long) for chosen in chosen_for_length.values())
    for search in all_searches:
        if found := search.best(runs):
            yield replace(found, seed=SEEDS[1])
    if best.keys() >= set(COMPARED):
        for seed in SEEDS[:2]:
            yield from (replace(chosen, seed=seed) for chosen in factors(best))
    for seed, chosen in itertools.product(SEEDS[1:], chosen_for_length.values()):
        yield replace(chosen, seed=seed, steps=long)


def in_turns(lists: Iterable[list[Settings]]) -> Iterator[Settings]:
    """The first of each list, then the second of each."""
    return (x for row in itertools.zip_longest(*lists) for x in row if x is not None)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, help="default: chitchat-dataset")
    p.add_argument("--model", choices=SIZES, default=MODEL)
    p.add_argument("--short", type=int, default=SHORT, help="steps of searches and ablation")
    p.add_argument("--long", type=int, default=LONG, help="steps of the final runs")
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "pretraining")
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    corpus, stop = Corpus(options.text, SIZES[options.model].vocabulary), StopSignal()
    runs, base = Runs(options.out / "pretraining.json"), start(corpus.name, options.model, options.short)

    def do(chosen: Settings, place: Path) -> Record | None:
        every = max(1, chosen.steps // EVALUATIONS)
        return run(corpus, chosen, place, stop, StudyTrainer, evaluate_every=every, keep=True)

    work(runs, lambda: study(runs, base, options.long), do, options.runs, stop)


if __name__ == "__main__":
    main()
