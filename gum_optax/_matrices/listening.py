"""Records the decisions of `init` for a listener such as `describe`."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple


class InitRecord(NamedTuple):
    """The decisions of every `init` in a `listening` block."""

    readings: dict[tuple[str, ...], Any]  # the reading of each leaf, by the names along its path
    ranks: list[int]  # the ranks of the low-rank rules
    unmatched: list[str]  # path patterns that decide no leaf


_LISTENER: contextvars.ContextVar[InitRecord | None] = contextvars.ContextVar("listener", default=None)


@contextlib.contextmanager
def listening() -> Iterator[InitRecord]:
    """Record the decisions of every `init` in the block."""
    token = _LISTENER.set(record := InitRecord({}, [], []))
    try:
        yield record
    finally:
        _LISTENER.reset(token)


def listener() -> InitRecord | None:
    """The record of the enclosing `listening` block, if there is one."""
    return _LISTENER.get()
