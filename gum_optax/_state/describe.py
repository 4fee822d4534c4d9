"""Describes how an optimizer treats a model, leaf by leaf: read it before the first step."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._core.checks import check_arrays, check_rule
from .._lowrank.low_rank import LowRankState
from .._lowrank.unbiased import SampledState
from .._matrices.decisions import doubts
from .._matrices.dimension_numbers import leaf_names
from .._matrices.listening import InitRecord, listening
from .._matrices.parts import Apart
from .._matrices.rules.leaves import Reading
from .._matrices.view import View, views_of
from .._matrices.with_shardings import undeclared_shardings
from .memory import LeafMemory, aligned, memory_report, mib

Names = tuple[str, ...]


class LeafDescription(NamedTuple):
    """A row of `describe`.

    Examples:
      >>> params = {"embedding": jnp.ones((16, 4)), "kernel": jnp.ones((4, 8))}
      >>> leaf = gum_optax.describe(gum_optax.muon(1e-3), params).leaves[0]
      >>> leaf.kind, leaf.reason, leaf.state
      ('embedding', 'an embedding by name', 512)
    """

    name: str  # the leaf's path, "layers/0/kernel"
    shape: tuple[int, ...]
    kind: str  # "matrix", "router", "embedding", "head", "vector", "token", "other"
    blocks: str  # "12 of 512 × 2048", the projected side first; for several parts, an entry for each
    rank: int | None  # the rank of the subspace; None: full rank, or not a matrix
    slots: str  # "1 of 12": how many of all blocks of this shape are at full rank in a period
    reason: str
    state: int  # bytes


class Description(NamedTuple):
    """Rows, and notes for the user; `str()` is a table, with one row for leaves that differ in a number.

    Examples:
      >>> params = {"gate": {"kernel": jnp.ones((4, 8))}, "up": {"kernel": jnp.ones((8, 16))}}
      >>> description = gum_optax.describe(gum_optax.galore_muon(1e-3, rank=4), params)
      >>> print(*description.notes)
      gate/kernel: a side is at most the rank 4, so the rule runs at full rank, with a full-size momentum
    """

    leaves: tuple[LeafDescription, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [["leaf", "shape", "taken for", "blocks", "step", "slots", "state MiB", "reason"]]
        for pattern, leaves in self._patterns().items():
            leaf = leaves[0]
            count = f"{len(leaves)} × " if len(leaves) > 1 else ""
            shape = count + ("×".join(map(str, leaf.shape)) or "-")
            is_matrix = leaf.kind in ("matrix", "router")
            step = "" if not is_matrix else "full rank" if leaf.rank is None else f"rank {leaf.rank}"
            state = mib(sum(x.state for x in leaves))
            lines.append([pattern[0], shape, leaf.kind, leaf.blocks, step, leaf.slots, state, leaf.reason])
        leaves = [x for x in self.leaves if x.kind != "state"]
        matrices = [x for x in leaves if x.kind in ("matrix", "router")]
        projected = sum(x.rank is not None for x in matrices)
        total = mib(sum(x.state for x in self.leaves))
        summary = (
            f"{len(matrices)} of {len(leaves)} leaves are matrices, {projected} of them projected;"
            f" state {total} MiB"
        )
        return "\n".join([aligned(lines), summary, *(f"- {note}" for note in self.notes)])

    def _patterns(self) -> dict[tuple[Any, ...], list[LeafDescription]]:
        """Groups of leaves that differ only in numbers along the path."""
        groups: dict[tuple[Any, ...], list[LeafDescription]] = {}
        for leaf in self.leaves:
            groups.setdefault((re.sub(r"\d+", "*", leaf.name), *leaf[1:]), []).append(leaf)
        return {(xs[0].name if len(xs) == 1 else key[0], *key[1:]): xs for key, xs in groups.items()}


def describe(tx: optax.GradientTransformation, params: Any) -> Description:
    """Show how `tx` treats each leaf: whether and why it is a matrix, its blocks, rank, slots and state.

    Args:
      tx: any optax optimizer; only those of this library report their decisions.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A `Description`; print it. Its notes list what deserves attention: leaves with two equally plausible
      readings, matrices that are not projected, shardings that `tx` does not know.

    Raises:
      TypeError: `tx` is not an `optax.GradientTransformation`.

    Examples:
      >>> params = {"embedding": jnp.ones((16, 4)), "kernel": jnp.ones((12, 4, 8))}
      >>> print(gum_optax.describe(gum_optax.gum(1e-3, rank=2), params))
             leaf   shape  taken for       blocks    step    slots  state MiB                reason
        embedding    16×4  embedding                                   0.0005  an embedding by name
           kernel  12×4×8     matrix  12 of 4 × 8  rank 2  1 of 12     0.0011     the last two axes
      bookkeeping       -      state                                   0.0000     of no single leaf
            slots       -      state                                   0.0001     of no single leaf
      1 of 2 leaves are matrices, 1 of them projected; state 0.0017 MiB
    """
    check_rule("tx", tx)
    check_arrays("params", params)
    with listening() as record:
        state = jax.eval_shape(
            lambda tree: tx.init(tree), params
        )  # a new lambda, so that JAX traces it again
        memory = {leaf.name: leaf for leaf in memory_report(tx, params).leaves}
    names = leaf_names(params)
    readings = [record.readings.get(x, Reading(None, "other", "not decided by gum_optax")) for x in names]
    leaves = [_Leaf(*row) for row in zip(names, jax.tree.leaves(params), readings, strict=True)]
    ranks = _ranks(state)
    slots = _slots(state, [view for leaf in leaves if leaf.names in ranks for view in leaf.views])
    rows = [leaf.row(ranks.get(leaf.names), slots, memory.pop(leaf.name)) for leaf in leaves]
    notes = [*_notes(record, [(leaf, row) for leaf, row in zip(leaves, rows, strict=True) if leaf.views])]
    if undeclared := undeclared_shardings(params, [reading.entry for reading in readings]):
        notes.append(
            f"{_some(undeclared)}: a mesh splits the matrices, but the optimizer does not know how; with"
            " weight_dimension_numbers=gum_optax.with_shardings(shardings) it sends less"
        )
    return Description((*rows, *map(_shared, memory.values())), tuple(notes))


class _Leaf:
    """A leaf of the parameters, and its matrices."""

    def __init__(self, names: Names, x: Any, reading: Reading):
        self.names, self.shape, self.reading = names, jnp.shape(x), reading
        self.name = "/".join(names) or "(the only leaf)"
        self.views: list[View] = []
        if reading.entry is not None:
            kernel = Apart(reading.entry, [x])
            parts = jax.eval_shape(kernel.apart, [x])
            self.views = jax.tree.leaves(views_of(kernel.entries, parts, wide=True))

    def row(self, rank: int | None, slots: dict[str, str], memory: LeafMemory) -> LeafDescription:
        blocks = [f"{_count(view)} of {view.shape[-2]} × {view.shape[-1]}" for view in self.views]
        own_slots = [slots[_group(view)] for view in self.views if rank is not None and _group(view) in slots]
        return LeafDescription(
            self.name,
            self.shape,
            self.reading.kind,
            " + ".join(blocks),
            rank,
            " + ".join(dict.fromkeys(own_slots)),
            self.reading.reason,
            sum(memory.state.values()),
        )


def _shared(leaf: LeafMemory) -> LeafDescription:
    return LeafDescription(
        leaf.name, (), "state", "", None, "", "of no single leaf", sum(leaf.state.values())
    )


def _count(view: View) -> int:
    return math.prod(view.shape[:-2])


def _group(view: View) -> str:
    return "x".join(map(str, view.shape[-2:]))


def _low_rank_states(state: Any) -> list[LowRankState]:
    """All low-rank states in a state, at any depth."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, LowRankState))
    own = [x for x in nodes if isinstance(x, LowRankState)]
    return own + [inner for x in own for field in x for inner in _low_rank_states(field)]


def _ranks(state: Any) -> dict[Names, int]:
    """The rank of each projected leaf; the rank of a part is also that of its kernel."""
    ranks: dict[Names, int] = {}
    for node in _low_rank_states(state):
        for names, x in zip(leaf_names(node.projectors), jax.tree.leaves(node.projectors), strict=True):
            ranks[names] = ranks[names[:-1]] = x.shape[-1]
    return ranks


def _slots(state: Any, projected: Sequence[View]) -> dict[str, str]:
    """For each sampled shape, how many of all blocks are at full rank in a period."""
    blocks: dict[str, int] = {}
    for view in projected:
        blocks[_group(view)] = blocks.get(_group(view), 0) + _count(view)
    outside = [node.outside for node in _low_rank_states(state)]
    draws = [x.index for x in outside if isinstance(x, SampledState) and isinstance(x.index, dict)]
    return {group: f"{x.shape[-1]} of {blocks[group]}" for draw in draws for group, x in draw.items()}


def _notes(record: InitRecord, matrices: Sequence[tuple[_Leaf, LeafDescription]]) -> Iterator[str]:
    """Sentences about what deserves the user's attention."""
    yield from doubts(record.readings)
    if record.unmatched:
        yield f"patterns of weight_dimension_numbers that decide no leaf: {record.unmatched}"
    if not record.ranks or not matrices:
        return
    rank = max(record.ranks)
    whole = [(leaf, row) for leaf, row in matrices if row.rank is None]
    small = [row.name for leaf, row in whole if all(view.shape[-2] <= rank for view in leaf.views)]
    alone = [row.name for leaf, row in whole if row.name not in small]
    at_full_rank = "the rule runs at full rank, with a full-size momentum"
    if len(whole) == len(matrices):
        yield f"nothing is projected at rank {rank}: on every matrix {at_full_rank}"
    if small:
        yield f"{_some(small)}: a side is at most the rank {rank}, so {at_full_rank}"
    if alone:
        yield f"{_some(alone)}: no other block has its shape to share full rank with, so {at_full_rank}"


def _some(names: Sequence[str]) -> str:
    shown = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
