"""What a finished run shows: a picture of its losses, and a row of a table."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from training import Trainer


def free_directory(name: str) -> Path:
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path


def plot_losses(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot training loss, averaged over a fiftieth of the run, and validation loss with markers."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, records in runs.items():
        width = max(1, len(records) // 50)
        chunks = [records[i : i + width] for i in range(0, len(records), width)]
        means = [sum(r["train_loss"] for r in chunk) / len(chunk) for chunk in chunks]
        (line,) = axes.plot([chunk[-1]["tokens"] for chunk in chunks], means, alpha=0.5, linewidth=1)
        seen = [r for r in records if "val_loss" in r]
        values = [r["val_loss"] for r in seen]
        axes.plot([r["tokens"] for r in seen], values, "o-", color=line.get_color(), markersize=3, label=name)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title="validation (dots), training (thin)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def summary_of(trainer: Trainer, records: list[dict[str, Any]]) -> dict[str, Any]:
    peak = trainer.peak_bytes()
    last = next((r["val_loss"] for r in reversed(records) if "val_loss" in r), None)
    return {
        "optimizer": trainer.settings.optimizer,
        "lr": trainer.settings.lr,
        "val_loss": last,
        "state_mib": trainer.optimizer_bytes() / 2**20,
        "peak_step_mib": None if peak is None else peak / 2**20,
        "tokens_per_second": records[-1]["tokens"] / records[-1]["seconds"] if records else None,
    }


def table(rows: list[dict[str, Any]]) -> str:
    heads = ["optimizer", "lr", "val loss", "state MiB", "peak step MiB", "tokens/s"]
    lines = [heads]
    for row in rows:
        lr, loss, *numbers = list(row.values())[1:]
        shown = [f"{x:.1f}" if x is not None else "-" for x in numbers]
        lines.append([row["optimizer"], f"{lr:g}", f"{loss:.4f}" if loss is not None else "-", *shown])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in lines)
