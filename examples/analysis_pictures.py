"""The pictures of `analysis.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from measures import binomial_interval
from run_groups import KINDS, OTHER_KINDS, RATES, Group, at_best_rates, compared

# The colours of Okabe and Ito, which the colour-blind tell apart, without yellow.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "osD^vPX"
STYLES = ("-", "--", ":", "-.")
START = "#888888"
MOST_PANELS = 12


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[number // len(COLOURS) % len(STYLES)],
    }


def _grid(
    count: int, *, columns: int = 3, size: tuple[float, float] = (3.6, 2.8)
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels."""
    across = min(count, columns)
    rows = -(-count // across)
    figure, axes = plt.subplots(
        rows,
        across,
        figsize=(max(size[0] * across, 7), size[1] * rows + 0.7),
        layout="constrained",
        squeeze=False,
    )
    panels = list(axes.flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    for panel in panels[:count]:
        panel.grid(axis="y", alpha=0.3)
    return figure, panels[:count]


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axes: Axes, x: Any, mean: np.ndarray, spread: np.ndarray | None, label: str, **style: Any) -> None:
    """A line, with a band of one standard deviation over seeds."""
    axes.plot(x, mean, label=label, linewidth=1.4, **style)
    if spread is not None:
        axes.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.2, linewidth=0)


def _legend(figure: Figure, axes: Axes, columns: int = 6) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), fontsize=8)


def _panels_of_residual(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Groups with projections by optimizer and rank, the ones with most lines first."""
    panels: dict[str, list[Group]] = {}
    for group in groups:
        if group.has("residual_share"):
            panels.setdefault(f"{group.optimizer}, rank {group.settings['rank']}", []).append(group)
    most = sorted(panels, key=lambda title: -len(panels[title]))[:MOST_PANELS]
    return {title: sorted(panels[title], key=lambda g: g.settings["period"]) for title in sorted(most)}


def _draw_in_panel(panel: Axes, title: str, groups: Sequence[Group], path: Sequence[str], x: Any) -> None:
    """A line for each group: what stands at `path`, over `x`, a function of the group and that."""
    for number, group in enumerate(groups):
        mean, spread = group.at("residual_share", *path)
        told = [name for name in group.varied if name not in (*RATES, "rank", "period")]
        label = group.label(["period", *told]).removeprefix(f"{group.optimizer}, ")
        _line(panel, x(group, mean), mean, spread, label, **_style(number))
    random, _ = groups[0].at("residual_share", "of_random_subspace")
    panel.axhline(random, color=START, linestyle="--", linewidth=1, label="random subspace")
    panel.set(title=title, ylim=(0, 1), ylabel="residual share |G - PPᵀG| / |G|")
    panel.legend(fontsize=7)


def draw_residual_in_period(groups: Sequence[Group], path: Path) -> None:
    """The residual share by steps since the refresh."""
    panels = _panels_of_residual(groups)
    figure, axes = _grid(len(panels))
    for panel, (title, own) in zip(axes, panels.items(), strict=True):
        _draw_in_panel(panel, title, own, ["by_place"], lambda group, mean: np.arange(1, len(mean) + 1))
        panel.set(xscale="log", xlabel="step of the period (1: the refresh)")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")
    figure.suptitle("What the subspace loses of the gradient, mean over all periods")
    _save(figure, path)


def draw_residual_by_refresh(groups: Sequence[Group], path: Path) -> None:
    """The residual share over the training: at the refresh and on average in each period."""

    def steps(group, mean):
        return group.at("residual_share", "by_refresh", "step")[0]

    panels = _panels_of_residual(groups)
    figure, axes = _grid(len(panels))
    for panel, (title, own) in zip(axes, panels.items(), strict=True):
        _draw_in_panel(panel, title, own, ["by_refresh", "mean"], steps)
        for number, group in enumerate(own):
            first, _ = group.at("residual_share", "by_refresh", "first")
            panel.plot(steps(group, first), first, ".", color=_style(number)["color"], markersize=4)
        panel.set(xlabel="training step")
    figure.suptitle("Residual share over the training: mean of each period (lines), at its refresh (dots)")
    _save(figure, path)


def _kinds(groups: Sequence[Group]) -> list[str]:
    return [kind for kind in (*KINDS, *OTHER_KINDS) if kind in groups[0].runs[0]["weights"]]


def draw_singular_values(groups: Sequence[Group], path: Path, section: str, what: str) -> None:
    """The singular values of each kind of matrix over the largest."""
    kinds = _kinds(groups)
    figure, axes = _grid(len(kinds))
    for panel, kind in zip(axes, kinds, strict=True):
        for number, group in enumerate(groups):
            mean, spread = group.at(section, kind, "singular_values")
            _line(panel, np.linspace(0, 1, len(mean)), mean, spread, group.optimizer, **_style(number))
        if section == "weights" and groups[0].has("start"):
            mean, _ = groups[0].at("start", kind, "singular_values")
            x = np.linspace(0, 1, len(mean))
            panel.plot(x, mean, color=START, linestyle="--", linewidth=1.2, label="before training")
        panel.set(title=kind, xlabel="place, from the largest", ylabel="σ / largest σ", ylim=(0, 1.02))
    figure.suptitle(f"Singular values of {what}, mean over layers")
    _legend(figure, axes[0])
    _save(figure, path)


def _points(
    axes: Axes,
    groups: Sequence[Group],
    names: Sequence[str],
    section: str,
    measure: str,
) -> None:
    """For each name a point for each group, with one standard deviation over seeds."""
    for number, group in enumerate(groups):
        shift = (number - (len(groups) - 1) / 2) * 0.8 / max(len(groups), 2)
        means, spreads = zip(*(group.mean(section, measure, [name]) for name in names), strict=True)
        axes.errorbar(
            np.arange(len(names)) + shift,
            means,
            yerr=None if spreads[0] is None else spreads,
            fmt=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            markersize=5,
            capsize=2,
            label=group.optimizer,
        )
    for edge in np.arange(len(names) - 1) + 0.5:
        axes.axvline(edge, color="#dddddd", linewidth=0.8, zorder=0)
    axes.set_xticks(np.arange(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8)


def draw_spectra(groups: Sequence[Group], path: Path) -> None:
    """Stable rank, uniformity and tail of each kind of matrix."""
    rows = {
        "stable_rank_share": "stable rank / min(m, n)",
        "uniformity": "exp(entropy) / min(m, n)",
        "tail_share": "share of |W|² in\nthe last 3/4 of σ",
    }
    with_change = all(group.has("change") for group in groups)
    sections = {"weights": "trained weights"} | ({"change": "their change, W - W₀"} if with_change else {})
    figure, axes = _grid(len(rows) * len(sections), columns=len(sections), size=(6.2, 2.5))
    panels = iter(axes)
    for measure, label in rows.items():
        for section, title in sections.items():
            panel, kinds = next(panels), _kinds(groups)
            if section == "weights" and groups[0].has("start"):
                start = [groups[0].mean("start", measure, [kind])[0] for kind in kinds]
                x = np.arange(len(kinds))
                panel.plot(x, start, "_", color=START, markersize=34)
                panel.plot([], [], color=START, label="before training")
            _points(panel, groups, kinds, section, measure)
            panel.set(ylabel=label, ylim=(0, None))
            if measure == "stable_rank_share":
                panel.set_title(title)
    figure.suptitle("How evenly the singular values are spread, mean over layers")
    _legend(figure, axes[0])
    _save(figure, path)


def draw_activations(groups: Sequence[Group], path: Path) -> None:
    """Kurtosis and largest value of the activations at the input of each kind of matrix."""
    names = list(groups[0].runs[0]["activations"])
    figure, axes = _grid(2, columns=2, size=(5.6, 3.6))
    labels = {"kurtosis": "excess kurtosis (normal: 0)", "max_over_rms": "largest |x| / root mean square"}
    for panel, (measure, label) in zip(axes, labels.items(), strict=True):
        panel.set_yscale("symlog" if measure == "kurtosis" else "log")
        _points(panel, groups, names, "activations", measure)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.set(ylabel=label, xlabel="input of")
    figure.suptitle("Tails of activations on the validation text, mean over layers and batches")
    _legend(figure, axes[0])
    _save(figure, path)


def draw_full_rank(groups: Sequence[Group], path: Path) -> None:
    """In how many periods each block ran at full rank, beside what chance allows."""
    figure, axes = _grid(len(groups), columns=2, size=(6.2, 2.6))
    for panel, group in zip(axes, groups, strict=True):
        total = group.full_rank()
        blocks = sorted(total, key=lambda name: (total[name]["fraction"], name.split("/")[-1], name))
        x = np.arange(len(blocks))
        expected = np.array([total[b]["periods"] * total[b]["fraction"] for b in blocks])
        low, high = np.array([binomial_interval(total[b]["periods"], total[b]["fraction"]) for b in blocks]).T
        panel.fill_between(x, low, high, step="mid", color=COLOURS[4], alpha=0.3, label="95 % of chance")
        panel.step(x, expected, where="mid", color=COLOURS[0], linewidth=1.2, label="expected")
        panel.plot(
            x, [total[b]["count"] for b in blocks], "o", color=COLOURS[5], markersize=4, label="counted"
        )
        panel.set_xticks(x, [" ".join(b.split("/")[:0:-1]) for b in blocks], rotation=90, fontsize=6)
        periods = total[blocks[0]]["periods"]
        seeds = f", {len(group.runs)} seeds together" if len(group.runs) > 1 else ""
        panel.set_title(f"{group.label()} ({periods} periods{seeds})", fontsize=9)
        panel.set(ylabel="periods at full rank", ylim=(0, None))
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle("How often each block ran at full rank")
    _legend(figure, axes[0])
    _save(figure, path)


def draw_all(groups: Sequence[Group], out: Path) -> list[str]:
    """Draw every picture that the runs have numbers for; returns the names of the files.

    Of runs that differ in learning rates alone, the pictures show the best. Those of weights and activations
    show one group of each optimizer.
    """
    best, shown = at_best_rates(groups), compared(groups)
    draw_spectra(shown, out / "spectra.png")
    draw_singular_values(shown, out / "singular_values.png", "weights", "trained weights")
    draw_activations(shown, out / "activations.png")
    names = ["spectra.png", "singular_values.png", "activations.png"]
    if all(group.has("change") for group in shown):
        names.append("singular_values_of_change.png")
        draw_singular_values(shown, out / names[-1], "change", "the change of weights, W - W₀")
    if _panels_of_residual(best):
        names += ["residual_in_period.png", "residual_by_refresh.png"]
        draw_residual_in_period(best, out / names[-2])
        draw_residual_by_refresh(best, out / names[-1])
    if sampled := [group for group in best if group.has("full_rank")]:
        names.append("full_rank.png")
        draw_full_rank(sampled[:MOST_PANELS], out / names[-1])
    return names
