"""Arrays of a state that are codes and scales, as float32, and back."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from .._linalg.quantize import LINEAR, SIGNED_FLOAT, SQUARES, dequantize, quantize
from .containers import Names, has_numbers

_CODES = {jnp.dtype(code.dtype): code for code in (LINEAR, SIGNED_FLOAT, SQUARES)}
# The fields that may hold codes, and the axis along which their numbers share scales.
_AXES = {"trace": -1, "projectors": -2, "mu": -1, "nu": -1}


def _coded(arrays: dict[Names, Any]) -> dict[Names, tuple[Names, str]]:
    """The names of arrays that have scales, with the names of the scales and the fields of the arrays."""
    found = {}
    for name in arrays:
        for i, part in enumerate(name):
            scales = (*name[:i], f"{part}_scales", *name[i + 1 :])
            if part in _AXES and scales in arrays:
                found[name] = scales, part
    return found


def are_coded(arrays: dict[Names, Any]) -> bool:
    """Whether some array of a state has scales."""
    return bool(_coded(arrays))


def widened(arrays: dict[Names, Any]) -> dict[Names, Any]:
    """The arrays of a state with float32 in place of codes, and without scales.

    A count that a momentum of eight bits has for its noise goes, too: a float32 momentum has none.
    """
    found = dict(arrays)
    for name, (scales, field) in _coded(arrays).items():
        x, s = arrays[name], found.pop(scales)
        if has_numbers(x):
            found[name] = dequantize(jnp.asarray(x), jnp.asarray(s), _CODES[x.dtype], _AXES[field])
        if field == "trace":
            found.pop((*name[: name.index(field)], "count"), None)
    return found


def narrowed(wide: dict[Names, Array], like: dict[Names, Array]) -> dict[Names, Array]:
    """The arrays of a state with the types of `like`, from float32 arrays, rounded to nearest."""
    found = {name: wide.get(name, x) for name, x in like.items()}
    for name, (scales, field) in _coded(like).items():
        code = _CODES[like[name].dtype]
        found[name], found[scales] = quantize(wide[name], code=code, axis=_AXES[field])
    return found
