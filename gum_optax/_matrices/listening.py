"""What `init` tells of its decisions to whoever listens, as `describe` does."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple


class Heard(NamedTuple):
    """What was told."""

    readings: dict[tuple[str, ...], Any]  # by the names along a leaf's path, what it is taken for
    ranks: list[int]  # of the low-rank rules
    unmatched: list[str]  # patterns of paths that decide no leaf


_LISTENER: contextvars.ContextVar[Heard | None] = contextvars.ContextVar("listener", default=None)


@contextlib.contextmanager
def listening() -> Iterator[Heard]:
    """What every `init` within tells."""
    token = _LISTENER.set(heard := Heard({}, [], []))
    try:
        yield heard
    finally:
        _LISTENER.reset(token)


def listener() -> Heard | None:
    """Whoever listens."""
    return _LISTENER.get()
