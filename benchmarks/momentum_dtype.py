"""What bfloat16 momentum costs in loss: muon, galore_muon and gum on real text, three seeds each way.

    python benchmarks/momentum_dtype.py

The runs of `corpus_comparison.py`, each optimizer at its best rate there, its momentum kept in float32 and in
bfloat16. Every finished run is written to `docs/results/momentum_dtype.json` at once; a run that is there
already is not made again.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from results import RESULTS, Results

from corpus_comparison import SEEDS, run, settings

# `corpus_comparison` has put the examples on the path.
from corpus import Corpus  # isort: skip
from optimizers import OPTIMIZERS  # isort: skip
from training import StopSignal  # isort: skip

DTYPES = ("float32", "bfloat16")


def table(runs: dict[str, dict[str, float]]) -> list[str]:
    """Mean and deviation over the seeds, a column a dtype."""
    lines = ["| optimizer | float32 | bfloat16 |", "|---|---|---|"]
    for name in dict.fromkeys(key.split()[0] for key in runs):
        cells = []
        for dtype in DTYPES:
            losses = list(runs.get(f"{name} {dtype}", {}).values())
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            cells.append(f"{statistics.fmean(losses):.4f}{spread}" if losses else "")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--optimizers", default="muon,galore_muon,gum")
    p.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    p.add_argument("--steps", type=int, help="default: those of corpus_comparison.py")
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    corpus, stop = Corpus(None, vocabulary=4096), StopSignal()
    results = Results(options.out / "momentum_dtype.json", table)
    for seed in map(int, options.seeds.split(",")):
        for name in options.optimizers.split(","):
            for dtype in DTYPES:
                chosen = settings(corpus, name, OPTIMIZERS[name][1], seed)
                chosen = dataclasses.replace(chosen, momentum_dtype=dtype)
                if options.steps:
                    chosen = dataclasses.replace(chosen, steps=options.steps)
                protocol = f"validation loss, {chosen.model}, {chosen.steps} steps"
                runs: dict[str, Any] = results.data["settings"].get(protocol, {"rows": {}})["rows"]
                losses = runs.setdefault(f"{name} {dtype}", {})
                if str(seed) in losses:
                    continue
                with tempfile.TemporaryDirectory() as place:
                    record = run(corpus, chosen, Path(place) / "run", stop)
                if record is None:
                    return
                losses[str(seed)] = record["val_loss"]
                results.add(protocol, runs)
                print(json.dumps({name: {dtype: losses}}), flush=True)
    print(results.text())


if __name__ == "__main__":
    main()
