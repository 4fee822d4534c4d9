"""Layers of Equinox and Haliax: the class of a layer tells the axes of its weights."""

from collections.abc import Iterable
from typing import Any

from .leaves import Leaf, Model, Reading, matrix


def _library_class(module: Any) -> type:
    """The class of the library; the class of a model's layer may derive from it."""
    return next(c for c in type(module).__mro__ if c.__module__.startswith(("equinox.nn", "haliax.nn")))


def layers(leaf: Leaf, model: Model) -> Reading | None:
    """Reads a leaf by the layer that holds it."""
    del model
    module = leaf.module
    if module is None or len(leaf.shape) < 2:
        return None
    library_class = _library_class(module)
    library, name = library_class.__module__.split(".")[0], library_class.__name__
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
    """The names of a Haliax axis, of several axes, or of a mapping from names to sizes."""
    several = axes if isinstance(axes, Iterable) and not isinstance(axes, str) else (axes,)
    return tuple(axis if isinstance(axis, str) else axis.name for axis in several)


def _haliax(leaf: Leaf, module: Any, why: str) -> Reading | None:
    """Fan-in is `In` and the window of a convolution, fan-out is `Out`; all other axes are stacks."""
    window = _names(getattr(module, "Spatial", ()))
    fans = ((*_names(module.In), *window), _names(module.Out))
    inputs, outputs = ([leaf.axes.index(name) for name in names if name in leaf.axes] for names in fans)
    if not inputs or not outputs:
        return Reading(None, "vector", f"{why} with one side")
    if window and leaf.shape[inputs[0]] == 1:
        return Reading(None, "depthwise convolution", why)
    return matrix(leaf, inputs, outputs, why)


def _equinox(leaf: Leaf, module: Any, why: str) -> Reading | None:
    """The last axes are `(out, in)` or `(out, in / groups, *window)`; axes before them are a stack."""
    window = getattr(module, "num_spatial_dims", 0)
    axes = range(len(leaf.shape) - 2 - window, len(leaf.shape))
    if axes[0] < 0:
        return None
    if window and leaf.shape[axes[1]] == 1:
        return Reading(None, "depthwise convolution", why)
    return matrix(leaf, axes[1:], axes[:1], why)
