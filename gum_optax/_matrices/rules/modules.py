"""Layers of Equinox and Haliax, whose kind tells the axes of their weights."""

from collections.abc import Iterable
from typing import Any

from .leaves import Leaf, Model, Reading, matrix


def _kind(module: Any) -> type:
    """The library's class, of which a model's own may be derived."""
    return next(k for k in type(module).__mro__ if k.__module__.startswith(("equinox.nn", "haliax.nn")))


def layers(leaf: Leaf, model: Model) -> Reading | None:
    """By the layer that holds the leaf."""
    del model
    module = leaf.module
    if module is None or len(leaf.shape) < 2:
        return None
    kind = _kind(module)
    library, name = kind.__module__.split(".")[0], kind.__name__
    why = f"{library.capitalize()}'s {name}"
    if name == "Embedding":
        return Reading(None, "embedding", why)
    if "norm" in name.lower():
        return Reading(None, "vector", why)
    if hasattr(module, "In") and hasattr(module, "Out") and leaf.name == "weight":
        return _haliax(leaf, module, why)
    if library == "equinox" and leaf.name.startswith("weight"):
        return _equinox(leaf, module, why)
    return None


def _names(axes: Any) -> tuple[str, ...]:
    """Of a Haliax axis, of several, or of a mapping from names to sizes."""
    several = axes if isinstance(axes, Iterable) and not isinstance(axes, str) else (axes,)
    return tuple(axis if isinstance(axis, str) else axis.name for axis in several)


def _haliax(leaf: Leaf, module: Any, why: str) -> Reading | None:
    """From `In`, with the window of a convolution, to `Out`; all other axes are stacks."""
    window = _names(getattr(module, "Spatial", ()))
    fans = ((*_names(module.In), *window), _names(module.Out))
    inputs, outputs = ([leaf.axes.index(name) for name in names if name in leaf.axes] for names in fans)
    if not inputs or not outputs:
        return Reading(None, "vector", f"{why} with one side")
    if window and leaf.shape[inputs[0]] == 1:
        return Reading(None, "depthwise convolution", why)
    return matrix(leaf, inputs, outputs, why)


def _equinox(leaf: Leaf, module: Any, why: str) -> Reading | None:
    """`(out, in)` and `(out, in / groups, *window)`; in a stack of layers, after the layers."""
    window = getattr(module, "num_spatial_dims", 0)
    axes = range(len(leaf.shape) - 2 - window, len(leaf.shape))
    if axes[0] < 0:
        return None
    if window and leaf.shape[axes[1]] == 1:
        return Reading(None, "depthwise convolution", why)
    return matrix(leaf, axes[1:], axes[:1], why)
