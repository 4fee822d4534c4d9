"""Training runs of a benchmark, continued where they stopped and kept in a file that processes share."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from results import round_robin

import gum_optax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from corpus import replace_file  # noqa: E402
from optimizers import Settings, completed  # noqa: E402
from training import RunDirectory, StopSignal, Trainer, train_to_the_end  # noqa: E402

Record = dict[str, Any]


def run(
    corpus: Any,
    chosen: Any,
    place: Path,
    stop: StopSignal,
    make_trainer: Callable[[Any, Any], Trainer] = Trainer,
    *,
    evaluate_every: int = 100,
    keep: bool = False,
    finish: Callable[[Any], Record] = lambda trainer: {},
) -> Record | None:
    """The losses of the run in the directory `place`, resumed if it was stopped before.

    `None` if it is stopped again. A finished run's directory is removed, or kept on request. `finish`
    measures more on the trainer of a finished run.
    """
    directory = RunDirectory(place, chosen, resume=place.exists())
    trainer = make_trainer(chosen, corpus)
    every = evaluate_every
    if not train_to_the_end(trainer, directory, stop, evaluate_every=every, save_every=every):
        return None
    records, more = directory.records(), finish(trainer)
    if not keep:
        shutil.rmtree(place)
    validation = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
    losses = [r["train_loss"] for r in records]
    return {
        "val_loss": validation[chosen.steps],
        "validation": validation,
        "train_loss": [round(statistics.fmean(losses[i : i + 10]), 4) for i in range(0, len(losses), 10)],
    } | more


def finished(record: Record | None) -> Record:
    """The record of a run; ends the script if the run was stopped."""
    if record is None:
        raise SystemExit("Stopped and saved; the same command goes on.")
    return record


def step_seconds(trainers: Mapping[str, Trainer], rounds: int, steps: int) -> dict[str, float]:
    """The seconds of a step: medians of rounds in which every trainer takes a few steps in turn."""

    def seconds_of(trainer):
        begun = time.perf_counter()
        for _ in range(steps):
            trainer.train_step()
        return (time.perf_counter() - begun) / steps

    actions = {name: functools.partial(seconds_of, trainer) for name, trainer in trainers.items()}
    times = round_robin(actions, rounds)
    return {name: statistics.median(found) for name, found in times.items()}


def best_rate(tried: dict[float, float]) -> float:
    return min(tried, key=tried.__getitem__)


def next_rates(tried: dict[float, float], start: float) -> list[float]:
    """The rates to try next, from `{rate: loss}`; none when the best rate has two worse neighbours.

    The grid is `start` times the powers of two, without bounds.
    """
    best = best_rate(tried) if tried else None
    return [start] if best is None else [rate for rate in (2 * best, best / 2) if rate not in tried]


@functools.cache
def commit() -> str:
    """The commit of the code when first asked, with `+` if tracked files differ from it.

    In a source archive, which has no commit, the version of the package.
    """
    if not (ROOT / ".git").exists():
        return f"version {gum_optax.__version__}"

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True
        ).stdout

    return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(
        git("diff", "HEAD", "--stat", "--", "*.py")
    )


class Runs:
    """The finished runs, in a JSON file that several processes may fill at once."""

    def __init__(self, path: Path):
        self.path = path
        self._read: tuple[Any, list[Record]] = None, []

    def all(self) -> list[Record]:
        """All finished runs; reads the file again if another process has changed it."""
        if not self.path.exists():
            return []
        stat = self.path.stat()
        stamp = stat.st_mtime_ns, stat.st_ino
        if stamp != self._read[0]:
            self._read = stamp, json.loads(self.path.read_text())["runs"]
        return self._read[1]

    def find(self, chosen: Settings) -> Record | None:
        wanted, kind = dataclasses.asdict(chosen), type(chosen)
        return next((r for r in self.all() if completed(kind, r["settings"]) == wanted), None)

    def add(self, chosen: Settings, record: Record) -> None:
        """Keep the record of a run, one line of the file, with its settings and the commit."""
        whole = {"settings": dataclasses.asdict(chosen), "commit": commit()} | record
        with locked(self.path, wait=True):
            lines = ",\n".join(json.dumps(r) for r in [*self.all(), whole])
            replace_file(self.path, lambda part: part.write_text(f'{{"runs": [\n{lines}\n]}}\n'))


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone holds the lock beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


class Search(NamedTuple):
    """The search for the best value of one rate, by runs that differ in nothing else."""

    start: Settings
    rate: str  # the field of the settings

    def tried(self, runs: Runs) -> dict[float, float]:
        own, kind = dataclasses.asdict(self.start), type(self.start)
        same_rate = {self.rate: own[self.rate]}
        found = [r for r in runs.all() if completed(kind, r["settings"]) | same_rate == own]
        return {r["settings"][self.rate]: r["val_loss"] for r in found}

    def wanted(self, runs: Runs) -> list[Settings]:
        """The runs to do next."""
        rates = next_rates(self.tried(runs), getattr(self.start, self.rate))
        return [dataclasses.replace(self.start, **{self.rate: rate}) for rate in rates]

    def best(self, runs: Runs) -> Settings | None:
        """The settings at the best rate, once the search is done."""
        if self.wanted(runs):
            return None
        return dataclasses.replace(self.start, **{self.rate: best_rate(self.tried(runs))})


def name_of(s: Settings) -> str:
    """The name of a run's directory."""
    own = f"{s.optimizer} by head" if getattr(s, "head_dim", 0) else s.optimizer
    parts = [own, f"{s.steps} steps", f"rate {s.lr:g}", f"others {s.others_lr:g}", f"rank {s.rank}"]
    return ", ".join([*parts, f"period {s.period}", f"fraction {s.full_rank_fraction:g}", f"seed {s.seed}"])


def work(
    runs: Runs,
    study: Callable[[], Iterable[Any]],
    do: Callable[[Any, Path], Record | None],
    places: Path,
    stop: StopSignal,
) -> None:
    """Do every run of a study that is not done, beside other processes that do the same.

    Args:
      runs: the runs that are done.
      study: the settings of the runs that can be done now, the most urgent first, also of done ones.
      do: a run in its directory; `None` if it was stopped.
      places: where the directories are.
    """
    while not stop.came:
        missing = [chosen for chosen in study() if runs.find(chosen) is None]
        if not missing:
            return
        for chosen in missing:
            place = places / name_of(chosen)
            with locked(place) as mine:
                if not mine or runs.find(chosen):
                    continue
                record = do(chosen, place)
                if record is None:
                    return
                runs.add(chosen, record)
                print(f"{place.name}: {record['val_loss']:.4f}", flush=True)
                break
        else:
            time.sleep(10)  # all that can be done now is being done
