"""Layers of Equinox and Haliax, whose kind tells the axes of their weights."""

from collections.abc import Sequence
from typing import Any

from .leaves import Leaf, Model, Reading, matrix


def _is_kind(module: Any, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__)


def layers(leaf: Leaf, model: Model) -> Reading | None:
    """By the layer that holds the leaf."""
    del model
    module = leaf.module
    if module is None or len(leaf.shape) < 2:
        return None
    why = f"{type(module).__module__.split('.')[0].capitalize()}'s {type(module).__name__}"
    if _is_kind(module, "Embedding"):
        return Reading(None, "embedding", why)
    if "norm" in type(module).__name__.lower():
        return Reading(None, "vector", why)
    if hasattr(module, "In") and hasattr(module, "Out") and leaf.name == "weight":
        return _haliax_linear(leaf, module, why)
    if type(module).__module__.startswith("equinox") and leaf.name.startswith("weight"):
        return _equinox(leaf, module, why)
    return None


def _names(axes: Any) -> tuple[str, ...]:
    """Of a Haliax axis or several."""
    several = axes if isinstance(axes, Sequence) and not isinstance(axes, str) else (axes,)
    return tuple(axis if isinstance(axis, str) else axis.name for axis in several)


def _haliax_linear(leaf: Leaf, module: Any, why: str) -> Reading | None:
    sides = [[leaf.axes.index(x) for x in _names(side) if x in leaf.axes] for side in (module.In, module.Out)]
    if not all(sides):
        return Reading(None, "vector", f"{why} with one side")
    return matrix(leaf, sides[0], sides[1], why)


def _equinox(leaf: Leaf, module: Any, why: str) -> Reading | None:
    """`(out, in)` and `(out, in / groups, *window)`; in a stack of layers, after the layers."""
    window = getattr(module, "num_spatial_dims", 0)
    axes = range(len(leaf.shape) - 2 - window, len(leaf.shape))
    if axes[0] < 0:
        return None
    if window and leaf.shape[axes[1]] == 1:
        return Reading(None, "depthwise convolution", why)
    return matrix(leaf, axes[1:], axes[:1], why)
