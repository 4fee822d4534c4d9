"""Groups the runs of `analysis.py` by their settings, compares optimizers, and makes the printed tables."""

import dataclasses
import functools
import json
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from measures import binomial_interval

KINDS = ("query", "key", "value", "out", "gate", "up", "down")  # of hidden matrices
OTHER_KINDS = ("embed", "lm_head")
RATES = ("lr", "others_lr")
SHORT = {"lr": "rate", "others_lr": "others' rate", "period": "K", "full_rank_fraction": "q"}

# What the paper says of GUM, and the measures that would show it: (section, measure).
CLAIMS = {
    "higher stable rank": [("weights", "stable_rank_share"), ("change", "stable_rank_share")],
    "more uniform singular values": [("weights", "uniformity"), ("change", "uniformity")],
    "longer tails": [
        ("weights", "tail_share"),
        ("change", "tail_share"),
        ("activations", "kurtosis"),
        ("activations", "max_over_rms"),
    ],
}


@dataclasses.dataclass
class Group:
    """Runs that differ in nothing but their seed."""

    settings: dict[str, Any]  # without the seed
    runs: list[dict[str, Any]]  # what was measured of each
    varied: Sequence[str] = ()  # the settings that tell it from other groups of its optimizer

    def label(self, settings: Sequence[str] | None = None) -> str:
        """The optimizer and some settings, by default those that tell the group from others."""
        names = self.varied if settings is None else settings
        parts = [f"{SHORT.get(name, name)} {_shown(self.settings[name])}" for name in names]
        return ", ".join([self.optimizer, *parts])

    @property
    def optimizer(self) -> str:
        return self.settings["optimizer"]

    @property
    def seeds(self) -> set[int]:
        return {run["seed"] for run in self.runs}

    @property
    def val_loss(self) -> float:
        return self.over_seeds(lambda run: run["val_loss"])[0]

    def has(self, section: str) -> bool:
        return all(run.get(section) for run in self.runs)

    def over_seeds(self, measure: Callable[[dict[str, Any]], Any]) -> tuple[Any, Any]:
        """The mean of a number or an array over the runs, and its standard deviation: None for one run."""
        values = np.array([measure(run) for run in self.runs], float)
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else None
        return values.mean(axis=0), spread

    def at(self, *path: str) -> tuple[Any, Any]:
        """`over_seeds` of what stands at these keys."""
        return self.over_seeds(lambda run: functools.reduce(operator.getitem, path, run))

    def mean(self, section: str, measure: str, kinds: Sequence[str]) -> tuple[Any, Any]:
        """A measure of some kinds of matrices or activations, over kinds, layers and seeds."""
        return self.over_seeds(lambda run: np.mean([np.mean(run[section][k][measure]) for k in kinds]))

    def full_rank(self) -> dict[str, dict[str, Any]]:
        """How often each block ran at full rank: the counts of all seeds, with trials and fraction."""
        total: dict[str, dict[str, Any]] = {}
        for run in self.runs:
            for block, own in run["full_rank"].items():
                held = total.setdefault(block, {"count": 0, "periods": 0, "fraction": own["fraction"]})
                held["count"] += own["count"]
                held["periods"] += own["periods"]
        return total


def grouped(runs: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> list[Group]:
    """Group pairs of settings and measured numbers, and note what tells each group from others."""
    groups: dict[str, Group] = {}
    for settings, measured in runs:
        own = {name: value for name, value in settings.items() if name != "seed"}
        groups.setdefault(json.dumps(own, sort_keys=True), Group(own, [])).runs.append(measured)
    found = sorted(groups.values(), key=_order)
    for group in found:
        same = [other.settings for other in found if other.optimizer == group.optimizer]
        group.varied = [k for k, value in group.settings.items() if any(s.get(k) != value for s in same)]
    return found


def _order(group: Group) -> list[Any]:
    """Sorts by optimizer, then by all other settings."""
    values = sorted(group.settings.items())
    return [group.optimizer, *((name, type(x).__name__, x if x is not None else 0) for name, x in values)]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _split_by(groups: Sequence[Group], ignored: Sequence[str]) -> list[list[Group]]:
    """The groups that agree in all settings but the ignored ones."""
    found = defaultdict(list)
    for group in groups:
        kept = {name: value for name, value in group.settings.items() if name not in ignored}
        found[json.dumps(kept, sort_keys=True)].append(group)
    return list(found.values())


def at_best_rates(groups: Sequence[Group]) -> list[Group]:
    """Of groups that differ in learning rates alone, the one with the lowest validation loss."""
    return [min(same, key=lambda group: group.val_loss) for same in _split_by(groups, RATES)]


def compared(groups: Sequence[Group]) -> list[Group]:
    """One group of each optimizer, at settings that most optimizers share; of several such the longest."""
    shared = _split_by(at_best_rates(groups), (*RATES, "optimizer"))
    return max(shared, key=lambda same: (len(same), same[0].settings["steps"]))


def claims(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """GUM's measures minus those of each other optimizer at the same seeds, over all kinds and by kind."""
    gum = next((group for group in groups if group.optimizer == "gum"), None)
    if gum is None:
        return []
    rows = []
    for claim, measures in CLAIMS.items():
        for section, measure in measures:
            for other in groups:
                seeds = sorted(gum.seeds & other.seeds)
                if other is not gum and seeds and gum.has(section) and other.has(section):
                    row = {"claim": claim, "of": section, "measure": measure, "against": other.optimizer}
                    rows.append(row | _difference(gum, other, section, measure, seeds))
    return rows


def _difference(gum: Group, other: Group, section: str, measure: str, seeds: Sequence[int]) -> dict[str, Any]:
    """The mean difference, its standard error over seeds, and in how many kinds GUM is higher.

    Runs of one seed start from the same weights and see the same text, so that they are compared in pairs.
    """
    kinds = KINDS if section != "activations" else list(gum.runs[0][section])

    def by_seed_and_kind(group):
        runs = {run["seed"]: run[section] for run in group.runs}
        return np.array([[np.mean(runs[seed][kind][measure]) for kind in kinds] for seed in seeds])

    own, others = by_seed_and_kind(gum), by_seed_and_kind(other)
    by_kind, by_seed = (own - others).mean(axis=0), (own - others).mean(axis=1)
    return {
        "gum": own.mean(),
        "other": others.mean(),
        "difference": by_seed.mean(),
        "standard_error": by_seed.std(ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else None,
        "kinds_higher": int(np.sum(by_kind > 0)),
        "kinds": len(kinds),
        "by_kind": dict(zip(kinds, by_kind, strict=True)),
        "seeds": seeds,
    }


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table, with its first column to the left and all others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        [row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def table(groups: Sequence[Group]) -> str:
    """One line for each group: means over seeds, layers and hidden kinds."""
    heads = "runs, seeds, val loss, stable rank, uniformity, tail, stable rank Δ, uniformity Δ, tail Δ"
    rows = [[*heads.split(", "), "residual", "in period", "kurtosis"]]
    for group in groups:
        spectra = [
            f"{group.mean(section, name, KINDS)[0]:.3f}" if group.has(section) else "-"
            for section in ("weights", "change")
            for name in ("stable_rank_share", "uniformity", "tail_share")
        ]
        shares = ["-", "-"]
        if group.has("residual_share"):
            by_place, _ = group.at("residual_share", "by_place")
            shares = [f"{by_place[0]:.3f}", f"{np.mean(by_place):.3f}"]
        kurtosis, _ = group.mean("activations", "kurtosis", list(group.runs[0]["activations"]))
        loss = f"{group.val_loss:.4f}"
        rows.append([group.label(), str(len(group.runs)), loss, *spectra, *shares, f"{kurtosis:.1f}"])
    note = (
        "Stable rank over min(m, n); tail: the share of |W|² beyond the first quarter of the singular values;"
        " Δ: of the change\nof the weights; residual: its share at the refresh, and its mean over the period."
    )
    return f"{_aligned(rows)}\n{note}"


def claims_table(rows: Sequence[dict[str, Any]]) -> str:
    """GUM against each other optimizer: the sign of each difference is what the claim is about."""
    lines = [["claim", "measure", "against", "gum", "other", "difference", "kinds higher"]]
    for row in rows:
        error = row["standard_error"]
        lines.append(
            [
                row["claim"],
                f"{row['measure']} of {row['of']}",
                row["against"],
                f"{row['gum']:.4f}",
                f"{row['other']:.4f}",
                f"{row['difference']:+.4f}" + (f" ± {error:.4f}" if error is not None else ""),
                f"{row['kinds_higher']} of {row['kinds']}",
            ]
        )
    return _aligned(lines) if rows else "There is no run of gum beside others of the same settings."


def full_rank_line(groups: Sequence[Group]) -> str:
    """How many blocks ran at full rank more or less often than chance allows."""
    parts = []
    for group in groups:
        outside = 0
        for own in (total := group.full_rank()).values():
            low, high = binomial_interval(own["periods"], own["fraction"])
            outside += not low <= own["count"] <= high
        if total:
            parts.append(f"{group.label()}: {outside} of {len(total)}")
    return f"Blocks at full rank outside of 95 % of chance: {'; '.join(parts)}." if parts else ""
