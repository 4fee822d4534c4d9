"""Reads the text of optimized HLO."""

import re


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the entry computation."""
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
            found[name] = []
        elif name:
            found[name].append(line)
    return found, entry


def turns(line: str) -> int | None:
    """How often a loop turns, or None if XLA does not say."""
    written = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    return int(written[1]) if written else None


def is_certain(line: str, computation: list[str]) -> bool:
    """Whether a conditional always takes its last branch: `in_one` branches on a constant."""
    predicate = re.search(r"conditional\(%?([\w.\-]+)", line)
    assert predicate, line
    start = re.compile(rf"\s*(?:ROOT )?%?{re.escape(predicate[1])} = \S+ [\w\-]+\((.*?)\)")
    (operands,) = [found[1] for other in computation if (found := start.match(other))]
    return all(name.startswith("constant") for name in re.findall(r"%([\w.\-]+)", operands))
