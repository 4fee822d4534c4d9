"""What benchmarks share: rounds of measurements, and a JSON file of results with a table beside it."""

import importlib.metadata
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def versions(*more: str) -> dict[str, str]:
    """The versions of what the figures depend on."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "optax", *more)}
    return found | {"python": platform.python_version()}


def round_robin(actions: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each action returns, its seconds: a round takes every action once, so a busy machine slows all."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, act in actions.items():
            found[name].append(act())
    return found


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean, standard deviation and number of values, as a cell of a table; empty without values."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.4f} ({len(values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


# Student's t for a two-sided interval of 95 %, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def mean_and_interval(values: Sequence[float]) -> str:
    """The mean and its 95 % interval by Student's t, as a cell of a table."""
    mean = f"{statistics.fmean(values):.4f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def beside(losses: Sequence[float], others: Sequence[float]) -> str:
    """The mean difference of losses, paired by seed, with its interval."""
    found = mean_and_interval([a - b for a, b in zip(losses, others, strict=False)])
    return found if found.startswith("-") else f"+{found}"


def losses_table(columns: Iterable[str], runs: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """A line for each optimizer, a cell for each column, from the losses by optimizer, column and seed."""
    columns = list(columns)
    lines = [f"| optimizer | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in runs.items():
        cells = (mean_and_deviation(list(row.get(column, {}).values())) for column in columns)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


class Results:
    """Settings measured at different times, in one file; a new measurement replaces the old one."""

    def __init__(self, path: Path, table: Callable[[Any], list[str]]):
        self.path, self.table = path, table
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"settings": {}}

    def rows(self, setting: str) -> dict[str, Any]:
        """The rows measured before."""
        return dict(self.data["settings"].get(setting, {"rows": {}})["rows"])

    def add(self, setting: str, rows: Any, *packages: str) -> None:
        """Store the rows of a setting, with the versions, of more packages too, and the machine."""
        machine = f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores"
        self.data["settings"][setting] = {"rows": rows, "versions": versions(*packages), "machine": machine}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(self.text())

    def text(self) -> str:
        """The table of each setting under its name."""
        settings = self.data["settings"].items()
        sections = [[f"{setting}:", "", *self.table(found["rows"])] for setting, found in settings]
        return "\n\n".join("\n".join(lines) for lines in sections) + "\n"
