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

from corpus import Corpus, CorpusError
from llama import SIZES
from optimizers import MOMENTUM_DTYPE, OPTIMIZERS, OTHERS, OTHERS_LR, Settings
from options import add_files, add_memory, decay, exit_status, fraction, positive, rate
from reporting import free_directory, plot_losses, summary_of, table
from training import RunDirectory, RunError, StopSignal, Trainer, train_to_the_end

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
    p.add_argument("--steps", type=positive, default=1200, help="default: 1200")
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
        help="what updates embedding, head and norms; adafactor holds 1/100 of the state (default: adamw)",
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
    add_memory(p)
    add_files(p)
    p.add_argument(
        "--text", type=Path, metavar="FILE", help="your own text, UTF-8 (default: chitchat-dataset)"
    )
    return p


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


def run_one(
    settings: Settings, corpus: Corpus, directory: RunDirectory, options: argparse.Namespace, stop: StopSignal
) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
    """Train one optimizer; returns its row of the table, its records, and whether it reached the end."""
    print(f"{settings.optimizer}: compiling the step of {settings.model} ...", flush=True)
    trainer = Trainer(settings, corpus)
    every = options.eval_every or max(1, settings.steps // 10)
    finished = train_to_the_end(trainer, directory, stop, evaluate_every=every, save_every=options.save_every)
    records = directory.records()
    row = summary_of(trainer, records)
    plot_losses({settings.optimizer: records}, directory.path / "loss.png")
    (directory.path / "summary.json").write_text(json.dumps(row, indent=1))
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
    return exit_status("pretrain.py", lambda: run(options), (CorpusError, RunError))


if __name__ == "__main__":
    sys.exit(main())
