"""What the benchmarks that train the small model for a thousand steps or less have in common."""

import argparse
from pathlib import Path
from typing import Any

from results import RESULTS

import trainings  # noqa: F401

# Importing `trainings` put the examples on the path.
from corpus import Corpus  # isort: skip
from llama import SIZES  # isort: skip
from optimizers import Settings  # isort: skip


def parser(description: str | None, *, steps: int, seeds: str) -> argparse.ArgumentParser:
    """The options of such a benchmark, with the defaults in which they differ."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, help="default: chitchat-dataset")
    p.add_argument(
        "--seeds", default=seeds, help=f"default: {seeds}; the first one searches what is searched"
    )
    p.add_argument("--model", choices=SIZES, default="0.6m")
    p.add_argument("--steps", type=int, default=steps)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seq", type=int, default=64)
    p.add_argument("--out", type=Path, default=RESULTS)
    return p


def settings(options: argparse.Namespace, corpus: Corpus, *, period: int = 50, **own: Any) -> Settings:
    """The settings of a run: `own` says in what the runs of a benchmark differ."""
    return Settings(
        model=options.model,
        steps=options.steps,
        batch=options.batch,
        seq=options.seq,
        rank=SIZES[options.model].rank,
        period=period,
        full_rank_fraction=1 / 16,
        weight_decay=0.1,
        text=corpus.name,
        **own,
    )


def protocol(options: argparse.Namespace) -> str:
    """What all runs of a benchmark share, in words."""
    return f"{options.model}, {options.steps} steps of {options.batch} × {options.seq} tokens"
