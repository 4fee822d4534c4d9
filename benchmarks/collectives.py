"""What devices exchange in one update: the collectives of the compiled program, in bytes on the wire.

    python benchmarks/collectives.py                     # eight forced host devices
    python benchmarks/collectives.py --platform tpu      # TPU v5e 2x4, ahead of time: see chips.py
    python benchmarks/collectives.py --platform h200     # eight GPUs of one machine, ahead of time

The update is that of one stack [8, 1024, 4096], float32, rank 128, two full-rank slots, sharded in four
ways. The script counts the bytes that each device sends in a bandwidth-optimal ring. A collective in a loop
counts once for each turn. The refresh, a branch that an ordinary step does not take, counts apart. The
results are `collectives.json` and `collectives.md` in `docs/results`.
"""

import argparse
import functools
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hlo
import jax
import jax.numpy as jnp
from chips import CHIPS, PACKAGES, devices_of
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from memory import optax_muon
from results import RESULTS, Results

import gum_optax as go

SIZES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
SHAPE = (8, 1024, 4096)
# The mesh, and what it shards.
LAYOUTS = {
    "n": ({"all": 8}, P(None, None, "all")),
    "m": ({"all": 8}, P(None, "all", None)),
    "2-D": ({"x": 2, "y": 4}, P(None, "x", "y")),
    "2-D, 4 × 2": ({"x": 4, "y": 2}, P(None, "x", "y")),
}


class Collective(NamedTuple):
    """One exchange of the program."""

    kind: str
    shapes: str
    wire: float  # bytes that one device sends
    times: int
    refresh: bool  # in a branch that an ordinary step does not take


def _bytes(shapes: str) -> int:
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(SIZES.get(kind, 0) * math.prod(int(d) for d in dims.split(",") if d) for kind, dims in found)


def _group(line: str, devices: int) -> int:
    """The number of devices that exchange with each other."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line):
        sizes = dict(axis.split("=") for axis in found[1].split(","))
        return math.prod(int(sizes[axis]) for axis in found[2].split(","))
    assert "replica_groups={}" in line or "source_target_pairs" in line, line
    return devices


def _wire(kind: str, size: int, group: int) -> float:
    """Bytes that one device sends for a result of `size`."""
    return {
        "all-reduce": 2 * size * (group - 1) / group,
        "all-gather": size * (group - 1) / group,
        "reduce-scatter": size * (group - 1),
        "all-to-all": size * (group - 1) / group,
        "ragged-all-to-all": size * (group - 1) / group,
        "collective-permute": size,
    }[kind]


def _loop(line: str, computations: dict[str, list[str]], times: int) -> tuple[str, int]:
    """The body of a loop, and how often it runs in all."""
    body, condition = (re.search(rf"{part}=%?([\w.\-]+)", line) for part in ("body", "condition"))
    assert body, line
    assert condition, line
    turns = hlo.turns(line)
    if turns is None:
        # A TPU's program lacks the trip count. It is the bound of the counter, the only constant of the
        # condition.
        bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations[condition[1]]))
        # A loop without a bound is that of the power steps, one at every refresh but the first.
        return body[1], times * int(bounds[0]) if bounds else times
    return body[1], times * turns


def collectives(text: str, devices: int = 8) -> list[Collective]:
    """All collectives of a compiled program."""
    computations, entry = hlo.computations(text)

    def within(name: str, times: int, refresh: bool) -> list[Collective]:
        found = []
        for line in computations.get(name, []):
            if made := re.search(rf"= (.*?) ({KINDS})(-start)?\(", line):
                result, kind, start = made.groups()
                if start and kind != "all-reduce":
                    # The operands precede the results; a GPU's program has them in a tuple of their own.
                    result = re.sub(r"^\((?:\(.*?\)|.*?\}), ", "", result)
                wire = _wire(kind, _bytes(result), _group(line, devices))
                found.append(Collective(kind, result, wire, times, refresh))
            elif " while(" in line:
                found += within(*_loop(line, computations, times), refresh)
            elif " conditional(" in line:
                branches = re.findall(r"%([\w.\-]+)", line.split("), ", 1)[1])
                taken = branches[-1:] if hlo.is_certain(line, computations[name]) else branches
                found += either([branch for branch in taken if branch in computations], times, refresh)
            elif called := re.search(r" (?:call|async-start)\(.*(?:to_apply|calls)=%?([\w.\-]+)", line):
                found += within(called[1], times, refresh)
        return found

    def either(names: list[str], times: int, refresh: bool) -> list[Collective]:
        """The cheapest branch, and as the refresh the dearest branch if it sends more."""
        by_bytes = sorted((within(name, times, refresh) for name in names), key=total)
        cheap, dear = by_bytes[0], by_bytes[-1]
        if total(dear) > total(cheap):
            return cheap + [c._replace(refresh=True) for c in dear]
        return cheap

    return within(entry, 1, False)


def total(found: list[Collective]) -> float:
    return sum(c.wire * c.times for c in found)


def one_gram(x: jax.Array) -> jax.Array:
    """Newton-Schulz through one Gram matrix: the devices of a sharded side exchange once."""
    return go.gram_newton_schulz(x, restart=5)


def optimizers(numbers: Any) -> dict[str, Callable[[], Any]]:
    """Optimizers that get the shardings from dimension numbers, and peers that do not."""
    # One power step, as at every refresh but the first.
    low = {"rank": 128, "find_subspace": functools.partial(go.subspace_iteration, iterations=1)}
    gum = {**low, "full_rank_fraction": 2 / 8}
    known = {"orthogonalizer": one_gram, "weight_dimension_numbers": numbers}
    return {
        "gum": lambda: go.gum(1e-3, **gum, **known),
        "gum, no shardings": lambda: go.gum(1e-3, **gum),
        "galore_muon": lambda: go.galore_muon(1e-3, **low, **known),
        "muon": lambda: go.muon(1e-3, **known),
        "sinkgd": lambda: go.sinkgd(1e-3),
        "optax.contrib.muon": optax_muon,
    }


def mesh_of(platform: str, sizes: dict[str, int]) -> Mesh:
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices_of(platform, 8)
    )


def compiled(name: str, mesh: Mesh, spec: P) -> str:
    """The program of one update, with gradients, state and steps sharded as in training."""
    params = {"kernel": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
    shardings = {"kernel": NamedSharding(mesh, spec)}
    tx = optimizers(go.with_shardings(shardings))[name]()
    states = go.state_shardings(tx, params, shardings)
    update = jax.jit(
        tx.update, in_shardings=(shardings, states, shardings), out_shardings=(shardings, states)
    )
    return update.lower(params, jax.eval_shape(tx.init, params), params).compile().as_text() or ""


def table(rows: dict[str, dict[str, list[float]]]) -> list[str]:
    """MiB sent in an update, and more at a refresh: a row for each optimizer, a column for each layout."""
    layouts = list(LAYOUTS)
    lines = ["| optimizer | " + " | ".join(layouts) + " |", "|---" * (len(layouts) + 1) + "|"]
    for name, found in rows.items():
        cells = [
            f"{found[x][0]:.2f}" + (f" + {found[x][1]:.2f}" if found[x][1] else "") if x in found else ""
            for x in layouts
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--platform", choices=CHIPS, default="cpu")
    p.add_argument("--optimizers", help="some of them, separated by semicolons; default: all")
    p.add_argument("--layouts", default=";".join(LAYOUTS), help="separated by semicolons; default: all")
    p.add_argument("--verbose", action="store_true", help="print every collective")
    p.add_argument("--out", type=Path, default=RESULTS)
    options = p.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    names = options.optimizers.split(";") if options.optimizers else list(optimizers(None))
    rows: dict[str, dict[str, list[float]]] = {}
    for name in names:
        for layout in options.layouts.split(";"):
            sizes, spec = LAYOUTS[layout]
            found = collectives(compiled(name, mesh_of(options.platform, sizes), spec))
            sent = [total([c for c in found if c.refresh == flag]) / 2**20 for flag in (False, True)]
            rows.setdefault(name, {})[layout] = [round(x, 3) for x in sent]
            print(f"{options.platform} {layout}  {name}  {sent[0]:.2f} + {sent[1]:.2f} MiB", flush=True)
            for c in found if options.verbose else ():
                print("   ", "refresh" * c.refresh, c.kind, c.shapes, f"{c.times} × {c.wire / 2**20:.3f}")
    Results(options.out / "collectives.json", table).add(
        f"{options.platform}, 8 devices", rows, *PACKAGES[options.platform]
    )


if __name__ == "__main__":
    main()
