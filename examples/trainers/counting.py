"""What the runs in other trainers share: data to learn, and a record of the losses."""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

VOCABULARY, BATCH, LENGTH = 64, 4, 16
# So small that a few steps cross a refresh, and that a run that stops after three steps is inside a period.
GUM = {"rank": 4, "period": 4, "full_rank_fraction": 0.5}


def sequence(number: int) -> np.ndarray:
    """Tokens that count up from a random start by a random stride."""
    draw = np.random.default_rng(number)
    first, stride = draw.integers(VOCABULARY), draw.integers(1, 4)
    return ((first + stride * np.arange(LENGTH)) % VOCABULARY).astype(np.int32)


def batches() -> Iterator[np.ndarray]:
    for step in itertools.count():
        yield np.stack([sequence(step * BATCH + i) for i in range(BATCH)])


def arguments(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="train up to this step (default 6)")
    parser.add_argument("--out", type=lambda x: Path(x).resolve(), required=True,
                        help="folder of the checkpoints; a run continues from the last one")  # fmt: skip
    return parser.parse_args()


class Record:
    """`losses.jsonl` in the run's folder, with a line for each step."""

    def __init__(self, out: Path):
        out.mkdir(parents=True, exist_ok=True)
        self._file = (out / "losses.jsonl").open("a")

    def __call__(self, step: int, loss: float) -> None:
        print(json.dumps({"step": int(step), "loss": float(loss)}), file=self._file, flush=True)


def report(opt_state: Any) -> None:
    """Print how often the subspace was found, and whether projectors and momenta are sharded."""
    print("devices", jax.device_count())
    for path, x in jax.tree_util.tree_leaves_with_path(opt_state):
        name = jax.tree_util.keystr(path)
        if "refreshes" in name:
            print("refreshes", x)
        if x.ndim > 1 and ("projectors" in name or "trace" in name):
            print(name, x.shape, "replicated" if x.sharding.is_fully_replicated else "sharded")
