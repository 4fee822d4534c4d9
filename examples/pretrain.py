"""Pretrain a small LLaMA on real text with GUM, or compare optimizers on it.

    python examples/pretrain.py
    python examples/pretrain.py --compare adamw,muon,galore_muon,gum --out runs/compare
    python examples/pretrain.py --out runs/mine --resume

The script runs on CPU, GPU and TPU without changes, in bfloat16 on the latter two.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from corpus import Corpus, CorpusError
from llama import SIZES
from optimizers import MOMENTUM_DTYPE, OPTIMIZERS, OTHERS, OTHERS_LR, Settings
from options import decay, fraction, positive, rate, seed
from training import RunDirectory, RunError, StopSignal, Trainer, train

PROMPT = "- Hi! How are you today?\n-"


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in OPTIMIZERS]
    if unknown or not names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"must be different names out of {', '.join(OPTIMIZERS)}, separated by commas; got {text!r}"
        )
    return names


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    which = p.add_mutually_exclusive_group()
    which.add_argument("--optimizer", choices=OPTIMIZERS, default="gum", help="default: gum")
    which.add_argument(
        "--compare",
        type=_names,
        metavar="A,B,C",
        help="train with each of them, from the same start on the same data",
    )
    p.add_argument("--model", choices=SIZES, default="3m", help="about how many parameters (default: 3m)")
    p.add_argument("--steps", type=positive, default=1200)
    p.add_argument("--batch", type=positive, default=8, help="windows in a step (default: 8)")
    p.add_argument("--seq", type=positive, default=128, help="tokens in a window (default: 128)")
    p.add_argument("--lr", type=rate, help="peak learning rate (default: the optimizer's, tuned on 3m)")
    p.add_argument(
        "--others-lr",
        type=rate,
        default=OTHERS_LR,
        help="peak rate for embedding, head and norms (default: %(default)g, tuned for AdamW on 3m)",
    )
    p.add_argument(
        "--others",
        choices=OTHERS,
        default="adamw",
        help="what updates embedding, head and norms; adafactor holds 1/1000 of the state (default: adamw)",
    )
    p.add_argument(
        "--rank", type=positive, help="rank of the low-rank optimizers (default: a quarter of the width)"
    )
    p.add_argument("--period", type=positive, default=100, help="steps between new subspaces (default: 100)")
    p.add_argument("--full-rank-fraction", type=fraction, default=1 / 16, help="GUM's q (default: 1/16)")
    p.add_argument("--weight-decay", type=decay, default=0.1, help="decoupled (default: 0.1)")
    p.add_argument(
        "--clip", type=decay, default=1.0, help="largest norm of the gradient; 0: any (default: 1)"
    )
    _add_memory(p)
    _add_files(p)
    return p


def _add_memory(p: argparse.ArgumentParser) -> None:
    """What saves memory."""
    p.add_argument(
        "--momentum-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help=f"the dtype of the momentum of {', '.join(MOMENTUM_DTYPE)} (default: float32)",
    )
    p.add_argument(
        "--weights-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="the dtype of the weights; bfloat16 is rounded stochastically (default: float32)",
    )
    p.add_argument(
        "--layerwise",
        action="store_true",
        help="use up each layer's gradient before the next is made, and clip each by its own norm",
    )


def _add_files(p: argparse.ArgumentParser) -> None:
    """What a run starts from, what it reads, and what it writes."""
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--out", type=Path, metavar="DIR", help="default: the next free runs/NAME-N")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument(
        "--text", type=Path, metavar="FILE", help="your own text, UTF-8 (default: chitchat-dataset)"
    )
    p.add_argument(
        "--eval-every", type=positive, help="steps between evaluations (default: a tenth of the run)"
    )
    p.add_argument(
        "--save-every", type=positive, default=200, help="steps between checkpoints (default: 200)"
    )


def settings_of(options: argparse.Namespace, optimizer: str, corpus: Corpus) -> Settings:
    return Settings(
        optimizer=optimizer,
        model=options.model,
        steps=options.steps,
        batch=options.batch,
        seq=options.seq,
        lr=options.lr or OPTIMIZERS[optimizer][1],
        others_lr=options.others_lr,
        rank=options.rank or SIZES[options.model].rank,
        period=options.period,
        full_rank_fraction=options.full_rank_fraction,
        weight_decay=options.weight_decay,
        seed=options.seed,
        text=corpus.name,
        momentum_dtype=options.momentum_dtype,
        weights_dtype=options.weights_dtype,
        others=options.others,
        clip=options.clip,
        layerwise=options.layerwise,
    )


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


def run_one(
    settings: Settings, corpus: Corpus, directory: RunDirectory, options: argparse.Namespace, stop: StopSignal
) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
    """Train one optimizer; returns its row of the table, its records, and whether it reached the end."""
    print(f"{settings.optimizer}: compiling the step of {settings.model} ...", flush=True)
    trainer = Trainer(settings, corpus)
    directory.open()
    directory.restore(trainer)
    every = options.eval_every or max(1, settings.steps // 10)
    for _ in train(trainer, directory, stop, evaluate_every=every, save_every=options.save_every):
        pass
    records = directory.records()
    row = summary_of(trainer, records)
    plot_losses({settings.optimizer: records}, directory.path / "loss.png")
    (directory.path / "summary.json").write_text(json.dumps(row, indent=1))
    finished = trainer.step == settings.steps
    if finished:
        text = trainer.sample(PROMPT if options.text is None else corpus.opening())
        (directory.path / "sample.txt").write_text(text)
        print(f"\nA sample of {settings.optimizer}:\n{text}\n")
    return row, records, finished


def directories(options: argparse.Namespace, corpus: Corpus, out: Path) -> dict[str, RunDirectory]:
    """The directory of each optimizer's run. All are claimed before the first run starts."""
    names = options.compare or [options.optimizer]
    if options.compare and (out / "settings.json").exists():
        raise RunError(f"{out} holds a single run; give a new directory as --out.")
    places = {name: out / name if options.compare else out for name in names}
    started = [name for name, place in places.items() if (place / "settings.json").exists()]
    if options.resume and not started:
        raise RunError(f"There is no run in {out} to resume; leave out --resume to start one.")
    return {
        name: RunDirectory(
            place, settings_of(options, name, corpus), resume=options.resume and name in started
        )
        for name, place in places.items()
    }


def run(options: argparse.Namespace) -> int:
    if options.resume and options.out is None:
        raise RunError("--resume needs the directory of the run to go on with: give --out DIR.")
    names = options.compare or [options.optimizer]
    without = [name for name in names if name not in MOMENTUM_DTYPE]
    if without and options.momentum_dtype != "float32":
        raise RunError(
            f"--momentum-dtype is for {', '.join(MOMENTUM_DTYPE)}; leave it out for {', '.join(without)}."
        )
    corpus = Corpus(options.text, SIZES[options.model].vocabulary)
    corpus.require(options.seq, options.batch)
    out = options.out or free_directory("compare" if options.compare else options.optimizer)
    claimed = directories(options, corpus, out)
    stop = StopSignal()
    rows, curves = [], {}
    for name, directory in claimed.items():
        settings = settings_of(options, name, corpus)
        row, records, finished = run_one(settings, corpus, directory, options, stop)
        if not finished:
            at = f"Stopped and saved at step {len(records)} of {options.steps}"
            print(f"{at}; go on with the same command and --resume --out {out}")
            return 0
        rows.append(row)
        curves[name] = records
    if options.compare:
        plot_losses(curves, out / "loss.png")
        (out / "summary.json").write_text(json.dumps(rows, indent=1))
    print(table(rows))
    print(f"Metrics, checkpoints and loss.png are in {out}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except (CorpusError, RunError) as error:
        print(f"pretrain.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pretrain.py: Interrupted; what the last checkpoint holds can be resumed.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
