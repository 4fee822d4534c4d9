"""Subspace finders on the gradients of a real run: energy beside the exact SVD's, and time.

    python benchmarks/refresh.py

The decoder `3m` of `examples/llama.py` trains with Muon on real text. Each finder follows its own chain of
subspaces from a random start, and all finders see the same gradients. Energy is `|PᵀG|²` over that of the top
`r` singular vectors. Times are medians on the largest matrix of LLaMA-130M and of LLaMA-350M, at rank 128.
The script writes `docs/results/refresh.json` and a table beside it.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from results import RESULTS, versions

import gum_optax as go

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from corpus import Corpus  # noqa: E402
from corpus_comparison import settings  # noqa: E402
from training import Trainer  # noqa: E402

RANK = 128
MATRICES = {"130m": (768, 2048), "350m": (1024, 2736)}

FINDERS: dict[str, Any] = {
    "svd_subspace": go.svd_subspace,
    "sketched_subspace, 1 step": functools.partial(go.sketched_subspace, iterations=1),
    "subspace_iteration, 1 step": functools.partial(go.subspace_iteration, iterations=1),
    "subspace_iteration, 2 steps": functools.partial(go.subspace_iteration, iterations=2),
    "subspace_iteration, 3 steps": functools.partial(go.subspace_iteration, iterations=3),
    "randomized_svd, 1 power step": functools.partial(go.randomized_svd, power_iterations=1),
    "randomized_svd, 2 power steps": functools.partial(go.randomized_svd, power_iterations=2),
}


def energies(trainer: Trainer, rank: int, period: int, refreshes: int) -> dict[str, list[list[float]]]:
    """The energies of all matrices over the exact ones, for each finder and refresh."""
    gradient = jax.jit(jax.grad(trainer._loss))
    finders = {name: jax.jit(finder) for name, finder in FINDERS.items()}
    chains: dict[str, dict[int, jax.Array]] = {name: {} for name in FINDERS}
    found: dict[str, list[list[float]]] = {name: [] for name in FINDERS}
    s = trainer.settings
    for refresh in range(refreshes):
        tokens = trainer.corpus.batch(trainer.step, batch=s.batch, length=s.seq, seed=s.seed)
        g = gradient(trainer.state[0], tokens)
        hidden = jax.tree.map(lambda x, entry: entry and x, g, go.hidden_matrices(g))
        matrices = [jnp.asarray(x) for x in jax.tree.leaves(hidden)]
        matrices = [x.mT if x.shape[0] > x.shape[1] else x for x in matrices]
        for name, finder in finders.items():
            row = []
            for i, x in enumerate(matrices):
                key = jax.random.fold_in(jax.random.key(0), i)
                before = chains[name].get(i)
                if before is None:
                    before = go.random_subspace(key, x, jnp.zeros((x.shape[0], rank)))
                p = finder(jax.random.fold_in(key, refresh), x, before)
                chains[name][i] = p
                row.append(float(jnp.sum((p.T @ x) ** 2)))
            found[name].append(row)
        for _ in range(period):
            trainer.train_step()
    exact = np.asarray(found["svd_subspace"])
    return {name: (np.asarray(rows) / exact).tolist() for name, rows in found.items()}


def milliseconds(finder: Any, shape: tuple[int, int], rank: int, rounds: int) -> float:
    g = jax.random.normal(jax.random.key(0), shape)
    p = go.random_subspace(jax.random.key(1), g, jnp.zeros((shape[0], rank)))
    finder = jax.jit(finder)
    key = jax.random.key(2)
    jax.block_until_ready(finder(key, g, p))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(finder(key, g, p))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def times(shape: tuple[int, int], rank: int, rounds: int) -> dict[str, float]:
    """Milliseconds of every finder on one matrix."""
    return {name: milliseconds(finder, shape, rank, rounds) for name, finder in FINDERS.items()}


def table(data: dict[str, Any]) -> str:
    titles = "| finder | energy, first refresh: median | later: median | later: worst |"
    titles += "".join(f" {size}: ms | of the SVD's |" for size in data["ms"])
    lines = [titles, "|---" * (titles.count("|") - 1) + "|"]
    for name, rows in data["energies"].items():
        first, later = np.asarray(rows[0]), np.asarray(rows[1:])
        shares = " | ".join(f"{x:.3f}" for x in (np.median(first), np.median(later), later.min()))
        times = [f"{ms[name]:.0f} | 1/{ms['svd_subspace'] / ms[name]:.0f}" for ms in data["ms"].values()]
        lines.append(f"| `{name}` | {shares} | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rank", type=int, default=48)
    p.add_argument("--period", type=int, default=50)
    p.add_argument("--refreshes", type=int, default=5)
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    corpus = Corpus(None, vocabulary=4096)
    trainer = Trainer(settings(corpus, "muon", 6e-3, 0), corpus)
    data: dict[str, Any] = {"versions": versions(), "rank": options.rank, "period": options.period}
    data["energies"] = energies(trainer, options.rank, options.period, options.refreshes)
    data["ms"] = {size: times(shape, RANK, 9) for size, shape in MATRICES.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "refresh.json").write_text(json.dumps(data) + "\n")
    (options.out / "refresh.md").write_text(table(data))
    print(table(data))


if __name__ == "__main__":
    main()
