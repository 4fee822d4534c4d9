"""Decides at `init` which leaf is which matrix, remembers the decisions, and warns or informs `describe`."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._core.checks import check_arrays
from .._mesh.axis_names import has_boxes
from .dimension_numbers import (
    Entry,
    WeightDimensionNumbers,
    check_patterns,
    is_patterns,
    leaf_names,
    matching,
)
from .hidden_matrices import RoutingWarning, decided
from .listening import listener
from .rules.leaves import Reading

# The latest decisions about trees with axis names, by the user's dimension numbers and the tree's paths and
# shapes. They serve optimizers that are constructed anew for every update, as by `optax.inject_hyperparams`.
_LATEST: dict[Any, tuple[WeightDimensionNumbers, list[Reading]]] = {}
_MOST = 64


class Decisions:
    """The decisions of one optimizer.

    Flax NNX passes variables with axis names to `init`, and arrays without names to `update`. So the
    decisions of `init` serve all trees of the same paths and shapes. They are not state: they follow from the
    parameters alone, and `of` decides anew if `init` was not called.
    """

    def __init__(self, spec: WeightDimensionNumbers):
        if isinstance(spec, str | int | float):
            raise TypeError(
                "weight_dimension_numbers must be optax.contrib.MuonDimensionNumbers or gum_optax.Parts, a"
                " tree of them, a function from the parameters to one, or patterns such as"
                f" {{'*/NAME/kernel': gum_optax.LAST_TWO}}, got {spec!r}."
            )
        check_patterns(spec)
        self.spec = spec
        self._kept: dict[Any, list[Reading]] = {}

    def decide_at_init(self, params: Any) -> list[Entry]:
        """Decide on parameters, with all the metadata of their library."""
        found = decided(self.spec, params)
        if found:
            signature = _signature(params)
            self._kept[signature] = found
            if has_boxes(params):
                # Store the user's object too, so that no other object gets its id.
                _LATEST[id(self.spec), signature] = self.spec, found
                if len(_LATEST) > _MOST:
                    _LATEST.pop(next(iter(_LATEST)))
        return _entries(found)

    def of(self, tree: Any) -> list[Entry]:
        """The decisions on parameters or gradients."""
        return _entries(self.readings(tree))

    def readings(self, tree: Any) -> list[Reading]:
        """The decisions on parameters or gradients, with what else is known of each leaf."""
        signature = _signature(tree)
        if signature in self._kept:
            return self._kept[signature]
        if not has_boxes(tree) and (id(self.spec), signature) in _LATEST:
            return _LATEST[id(self.spec), signature][1]
        return decided(self.spec, tree)

    def warning_at_init(self, init: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`init` with one warning about doubtful readings, or with a record for a listener instead."""

        def telling(params):
            check_arrays("params", params)
            state = init(params)  # first, so that its errors precede any warning
            readings = dict(zip(leaf_names(params), decided(self.spec, params), strict=True))
            unmatched = _unmatched(self.spec, params, list(readings))
            if (record := listener()) is None:
                _warn(readings, unmatched)
            else:
                record.readings.update({x: readings[x] for x in readings if x not in record.readings})
                record.unmatched.extend(unmatched)
            return state

        return telling


def _entries(readings: Sequence[Reading]) -> list[Entry]:
    return [reading.entry for reading in readings]


def _signature(tree: Any) -> Any:
    return tuple(zip(leaf_names(tree), map(jnp.shape, jax.tree.leaves(tree)), strict=True))


def doubts(readings: dict[tuple[str, ...], Reading]) -> list[str]:
    """A sentence for each leaf that has a second plausible reading."""
    return [
        f"{'/'.join(names)}: taken for {reading.entry} ({reading.reason}); it may as well be {reading.doubt}"
        for names, reading in readings.items()
        if reading.doubt
    ]


def _unmatched(spec: WeightDimensionNumbers, params: Any, names: Sequence[tuple[str, ...]]) -> list[str]:
    """The patterns that decide no leaf, because no leaf matches them or earlier patterns match first."""
    if not names or not isinstance(spec, dict) or not is_patterns(spec, params):
        return []
    used = {matching(spec, "/".join(x)) for x in names}
    return [pattern for pattern in spec if pattern not in used]


def _warn(readings: dict[tuple[str, ...], Reading], unmatched: Sequence[str]) -> None:
    sentences = doubts(readings)
    if sentences:
        warnings.warn(
            "a leaf has two equally plausible readings: "
            + "; ".join(sentences)
            + ". Decide with weight_dimension_numbers, such as {'*/NAME/kernel': gum_optax.LAST_TWO}.",
            RoutingWarning,
            stacklevel=3,
        )
    if unmatched:
        warnings.warn(
            f"weight_dimension_numbers has patterns that decide no leaf: {unmatched}; an example of a path is"
            f" {'/'.join(next(iter(readings)))!r}.",
            RoutingWarning,
            stacklevel=3,
        )
