"""Number types for argparse, with error messages that say what is allowed, and options of several scripts."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimizers import MOMENTUM_DTYPE


def number(kind: Callable[[str], Any], valid: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """An argparse type whose error message says what is allowed."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not valid(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return parse


positive = number(int, lambda x: x >= 1, "a whole number of at least 1")
seed = number(int, lambda x: 0 <= x < 2**32, "a whole number of at least 0")
rate = number(float, lambda x: 0 < x < math.inf, "a positive number")
decay = number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
fraction = number(float, lambda x: 0 <= x <= 1, "between 0 and 1")


def exit_status(program: str, run: Callable[[], int], refusals: tuple[type[Exception], ...]) -> int:
    """What `run` returns; 2 for a refusal, which is printed in a sentence, and 130 for Ctrl-C."""
    try:
        return run()
    except refusals as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: Interrupted; what the last checkpoint holds can be resumed.", file=sys.stderr)
        return 130


def add_memory(p: argparse.ArgumentParser) -> None:
    """What saves memory."""
    p.add_argument(
        "--momentum-dtype",
        choices=("float32", "bfloat16", "int8"),
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


def add_files(p: argparse.ArgumentParser) -> None:
    """What a run starts from, and what it writes."""
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--out", type=Path, metavar="DIR", help="default: the next free runs/NAME-N")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument(
        "--eval-every", type=positive, help="steps between evaluations (default: a tenth of the run)"
    )
    p.add_argument(
        "--save-every", type=positive, default=200, help="steps between checkpoints (default: 200)"
    )
