"""Which leaf is which matrix, decided at `init`: what is warned about, remembered, and told to `describe`."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._mesh.axis_names import has_boxes
from .dimension_numbers import Entry, WeightDimensionNumbers, is_patterns, leaf_names, matching
from .hidden_matrices import RoutingWarning, decided
from .listening import listener
from .rules.leaves import Reading

# The latest decisions about trees with names of axes, for an optimizer that is made anew for every update, as
# `optax.inject_hyperparams` makes it: by the user's word and the tree's paths and shapes.
_LATEST: dict[Any, tuple[WeightDimensionNumbers, list[Entry]]] = {}
_MOST = 64


class Decisions:
    """Those of one optimizer.

    Flax NNX shows `init` its variables, with the names of axes, and `update` arrays without any. So what
    `init` decides is kept for all trees of the same paths and shapes. It is no state: it follows from the
    parameters alone, and is decided anew where `init` was not called.
    """

    def __init__(self, spec: WeightDimensionNumbers):
        self.spec = spec
        self._kept: dict[Any, list[Entry]] = {}

    def made_at_init(self, params: Any) -> list[Entry]:
        """Of parameters, with all that their library says of them."""
        entries: list[Entry] = [reading.entry for reading in decided(self.spec, params)]
        if entries:
            signature = _signature(params)
            self._kept[signature] = entries
            if has_boxes(params):
                # With the user's word itself, so that no other takes its id.
                _LATEST[id(self.spec), signature] = self.spec, entries
                if len(_LATEST) > _MOST:
                    _LATEST.pop(next(iter(_LATEST)))
        return entries

    def of(self, tree: Any) -> list[Entry]:
        """Of parameters or gradients."""
        signature = _signature(tree)
        if signature in self._kept:
            return self._kept[signature]
        if not has_boxes(tree) and (id(self.spec), signature) in _LATEST:
            return _LATEST[id(self.spec), signature][1]
        return [reading.entry for reading in decided(self.spec, tree)]

    def told_at_init(self, init: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`init`, which warns of what is in doubt, once, or tells who listens."""

        def telling(params):
            state = init(params)  # whose errors come first
            found = dict(zip(leaf_names(params), decided(self.spec, params), strict=True))
            lost = _unmatched(self.spec, params, list(found))
            if (heard := listener()) is None:
                _warn(found, lost)
            else:
                heard.readings.update({x: found[x] for x in found if x not in heard.readings})
                heard.unmatched.extend(lost)
            return state

        return telling


def _signature(tree: Any) -> Any:
    return tuple(zip(leaf_names(tree), map(jnp.shape, jax.tree.leaves(tree)), strict=True))


def doubts(found: dict[tuple[str, ...], Reading]) -> list[str]:
    """A sentence for each leaf that may be another matrix."""
    return [
        f"{'/'.join(names)}: taken for {reading.entry} ({reading.reason}); it may as well be {reading.doubt}"
        for names, reading in found.items()
        if reading.doubt
    ]


def _unmatched(spec: WeightDimensionNumbers, params: Any, names: Sequence[tuple[str, ...]]) -> list[str]:
    """The patterns that match no leaf, or none that an earlier one has not matched."""
    if not names or not isinstance(spec, dict) or not is_patterns(spec, params):
        return []
    used = {matching(spec, "/".join(x)) for x in names}
    return [pattern for pattern in spec if pattern not in used]


def _warn(found: dict[tuple[str, ...], Reading], lost: Sequence[str]) -> None:
    said = doubts(found)
    if said:
        warnings.warn(
            "two readings of a leaf are as plausible: "
            + "; ".join(said)
            + ". Decide by weight_dimension_numbers, such as {'*/NAME/kernel': gum_optax.LAST_TWO}.",
            RoutingWarning,
            stacklevel=3,
        )
    if lost:
        warnings.warn(
            f"weight_dimension_numbers has patterns that decide no leaf: {lost}; paths are such as"
            f" {'/'.join(next(iter(found)))!r}.",
            RoutingWarning,
            stacklevel=3,
        )
