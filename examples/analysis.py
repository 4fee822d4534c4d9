"""Look into finished training runs: what projection loses, spectra of weights, tails of activations.

    python examples/analysis.py runs/compare/*/
    python examples/analysis.py runs/mine --text my_book.txt --out runs/analysis

Writes `analysis.json`, with all numbers, and pictures. Runs that differ in their seed alone are averaged.

- **Residual share**, `|G - P PᵀG| / |G|` over all projected matrices: by steps since the last refresh, and by
  refresh, beside that of a random subspace.
- **Spectra**, of the trained weights and of their change, `W - W₀`, for each kind of matrix: the singular
  values over the largest; the stable rank `|W|_F² / |W|_2²`, also over `min(m, n)`; the uniformity
  `exp(H) / min(m, n)`, with the entropy `H` of `σ² / Σσ²`; the tail, which is the share of `|W|_F²` beyond
  the first quarter of the singular values. A random start has a high stable rank already, so that weights
  that moved less look better: compare the change.
- **Full rank**: in how many periods each block ran at full rank, beside what chance allows.
- **Activations** on the validation text, at the input of each kind of matrix: excess kurtosis (0 for normal
  numbers) and the largest absolute value over the root mean square, in a batch.

The abstract of the GUM paper (Pan et al., arXiv 2510.17802) says that the improvement comes from "a more
uniform distribution of knowledge inside layers". It is tested here as three claims: a higher stable rank,
more uniform singular values, longer tails. Because tails can be those of the spectrum or those of the
activations, both are measured.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import measures
from analysis_pictures import draw_all
from corpus import Corpus, CorpusError
from finished_runs import (
    FinishedRun,
    Validation,
    Weights,
    blocks_by_group,
    named,
    read_run,
    read_weights,
    start_of,
)
from llama import SIZES
from run_groups import (
    KINDS,
    OTHER_KINDS,
    Group,
    claims,
    claims_table,
    compared,
    full_rank_line,
    grouped,
    table,
)
from training import RunError

POINTS = 33  # at which singular values are written
MODULES = {  # matrices that read the same activations
    "query": "query, key, value",
    "out": "out",
    "gate": "gate, up",
    "down": "down",
    "lm_head": "lm_head",
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="the directory of a finished run of pretrain.py"
    )
    p.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="the text that the runs were trained on (default: chitchat-dataset)",
    )
    p.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs/analysis"), help="default: %(default)s"
    )
    p.add_argument(
        "--skip-unfinished", action="store_true", help="leave out runs that are not finished, or damaged"
    )
    return p


def residual(run: FinishedRun) -> dict[str, Any] | None:
    """The residual share at each step, by place in the period, and by refresh; None without projections.

    A random subspace of rank `r` would leave `√(1 - r/m)`; `m` is the width of the model.
    """
    if "residual_share" not in run.records[-1]:
        return None
    shares, places = run.column("residual_share"), measures.places_in_period(run.column("refresh_count"))
    first = np.flatnonzero(places == 0)
    periods = np.cumsum(places == 0) - 1
    return {
        "by_step": shares,
        "by_place": measures.mean_by(places, shares),
        "of_random_subspace": max(1 - run.settings["rank"] / SIZES[run.settings["model"]].hidden, 0) ** 0.5,
        "by_refresh": {
            "step": first + 1,
            "first": shares[first],
            "mean": measures.mean_by(periods, shares),
            "last": shares[[*(first[1:] - 1), len(shares) - 1]],
        },
    }


def full_rank(run: FinishedRun, groups: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """In how many periods each block was sampled, with the number of periods and the chance in one."""
    slots = [name.split("/")[1:] for name in run.records[-1] if name.startswith("sampled/")]
    if not slots:
        return {}
    places = measures.places_in_period(run.column("refresh_count"))
    first = [run.records[i] for i in np.flatnonzero(places == 0)]
    counts = {}
    for group in sorted({group for group, _ in slots}):
        own = [f"sampled/{group}/{slot}" for other, slot in slots if other == group]
        drawn = np.bincount([record[name] for record in first for name in own], minlength=len(groups[group]))
        for name, count in zip(groups[group], drawn, strict=True):
            counts[name.removesuffix("/kernel")] = {
                "count": int(count),
                "periods": len(first),
                "fraction": len(own) / len(drawn),
            }
    return counts


def spectra(weights: Weights) -> dict[str, dict[str, Any]]:
    """The measures of each kind of matrix, by layer; the singular values are means over the layers."""
    kinds: dict[str, list[np.ndarray]] = {}
    for name, w in weights.items():
        kind = name.split("/")[-2]
        if kind in (*KINDS, *OTHER_KINDS) and w.ndim == 2:
            kinds.setdefault(kind, []).append(measures.singular_values(w))
    return {
        kind: {
            "stable_rank": np.array([measures.stable_rank(s) for s in values]),
            "stable_rank_share": np.array([measures.stable_rank(s) / len(s) for s in values]),
            "uniformity": np.array([measures.uniformity(s) for s in values]),
            "tail_share": np.array([measures.tail_share(s) for s in values]),
            "singular_values": np.mean([measures.quantiles(s, POINTS) for s in values], axis=0),
        }
        for kind, values in kinds.items()
    }


def activations(found: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """The measures of the inputs of linear layers, by module and layer."""
    by_module: dict[str, dict[str, list[float]]] = {}
    for name in sorted(found, key=lambda name: [part.zfill(4) for part in name.split("/")]):
        if label := MODULES.get(name.split("/")[-1]):
            for measure, value in found[name].items():
                by_module.setdefault(label, {}).setdefault(measure, []).append(value)
    return {
        label: {measure: np.array(x) for measure, x in by_module[label].items()}
        for label in MODULES.values()
        if label in by_module
    }


class Analysis:
    """Measures runs; what runs have in common is made once."""

    def __init__(self, text: Path | None):
        self.corpus = functools.cache(lambda vocabulary: Corpus(text, vocabulary))
        self.validation = functools.cache(
            lambda model, batch, seq: Validation(model, self.corpus(SIZES[model].vocabulary), batch, seq)
        )

    def measure(self, run: FinishedRun) -> dict[str, Any]:
        """All numbers of one run."""
        s = run.settings
        corpus = self.corpus(SIZES[s["model"]].vocabulary)
        if corpus.name != s["text"]:
            raise CorpusError(
                f"{run.path} was trained on {s['text']}, not on {corpus.name}: give it by --text."
            )
        validation = self.validation(s["model"], s["batch"], s["seq"])
        weights, (_, start) = read_weights(run), start_of(s["model"], s["seed"])
        found = {
            "run": run.path.name,
            "seed": s["seed"],
            "val_loss": run.val_loss,
            "activations": activations(validation.activations(run, weights)),
            "weights": spectra(weights),
            "residual_share": residual(run),
            "full_rank": full_rank(run, blocks_by_group(start)),
        }
        if validation.starts_from(run, start):
            before = {name: np.asarray(x) for name, x in named(start).items()}
            found["start"] = spectra(before)
            found["change"] = spectra({name: w - before[name] for name, w in weights.items()})
        return found


def plain(x: Any) -> Any:
    """Numbers with five digits, in lists and dicts, for JSON."""
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple | np.ndarray):
        return [plain(value) for value in x]
    if isinstance(x, float | np.floating):
        return float(f"{x:.5g}")
    return x.item() if isinstance(x, np.generic) else x


def summary(group: Group) -> dict[str, Any]:
    """Means over layers and seeds, each with its standard deviation over seeds."""
    found: dict[str, Any] = {"val_loss": group.over_seeds(lambda run: run["val_loss"])}
    for section in ("weights", "change", "start", "activations"):
        if group.has(section):
            found[section] = {
                kind: {name: group.mean(section, name, [kind]) for name in own if name != "singular_values"}
                for kind, own in group.runs[0][section].items()
            }
    return found


def as_json(groups: Sequence[Group]) -> str:
    """All numbers, with each list on a line of its own."""
    rows = []
    for group in groups:
        blocks = {
            name: own | {"interval_95": measures.binomial_interval(own["periods"], own["fraction"])}
            for name, own in group.full_rank().items()
        }
        row = {"label": group.label(), "settings": group.settings, "summary": summary(group)}
        rows.append(row | {"full_rank": blocks, "runs": group.runs})
    shown = compared(groups)
    data = {"compared": [group.label() for group in shown], "claims": claims(shown), "groups": rows}
    return re.sub(r"\[[^][{}]*\]", _on_one_line, json.dumps(plain(data), indent=1)) + "\n"


def _on_one_line(found: re.Match[str]) -> str:
    return re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]")


def kept(f: Callable[[Any], Any], items: Iterable[Any], skip: bool) -> Iterator[Any]:
    """`f` of each item; if `skip`, without those for which it raises a `RunError`."""
    for item in items:
        try:
            yield f(item)
        except RunError as error:
            if not skip:
                raise
            print(f"Left out: {error}", flush=True)


def run(options: argparse.Namespace) -> None:
    analysis = Analysis(options.text)

    def measure(one):
        print(one.path.name, flush=True)
        return one.settings, analysis.measure(one)

    runs = list(kept(read_run, options.runs, options.skip_unfinished))
    groups = grouped(kept(measure, runs, options.skip_unfinished))
    if not groups:
        raise RunError("None of these runs can be analysed.")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "analysis.json").write_text(as_json(groups))
    pictures = draw_all(groups, options.out)
    tables = [table(groups), claims_table(claims(compared(groups))), full_rank_line(groups)]
    print(*filter(None, tables), sep="\n\n")
    print(f"analysis.json, {', '.join(pictures)} are in {options.out}")


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        run(options)
    except (CorpusError, RunError) as error:
        print(f"analysis.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
