"""Number types for argparse, with error messages that say what is allowed."""

import argparse
import math
from collections.abc import Callable
from typing import Any


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
