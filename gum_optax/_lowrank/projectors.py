"""How projectors are stored between steps: in float32, or in eight bits."""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._core.acceptance import Accepted, choose
from .._core.checks import check_dtype
from .._linalg.orthonormal import straighten
from .._linalg.quantize import dequantize, quantize
from .._transforms.storage import requantize

# What is stored of a leaf's projector: itself, or its codes and scales.
Stored = tuple[Array, ...]

# Along the axis of the weight, since a rank may be small: 128 numbers of a column share a scale.
_AXIS = -2


class ProjectorStorage(Protocol):
    """A way to store the projector of a leaf."""

    def first(self, p: Float[Array, "*b m r"]) -> Stored:
        """What is stored before the first step."""
        ...

    def load(self, *stored: Array) -> Float[Array, "*b m r"]:
        """The projector in float32."""
        ...

    def choose(
        self, accepted: Accepted, new: Float[Array, "*b m r"], stored: Stored
    ) -> Float[Array, "*b m r"]:
        """The projector of a step that a leaf may reject."""
        ...

    def store(
        self, is_refresh: Bool[Array, ""], accepted: Accepted, chosen: Float[Array, "*b m r"], stored: Stored
    ) -> Stored:
        """What is stored after a step."""
        ...


class _ExactProjector:
    """In float32."""

    def first(self, p: Float[Array, "*b m r"]) -> Stored:
        return (p,)

    def load(self, *stored: Array) -> Float[Array, "*b m r"]:
        return stored[0]

    def choose(
        self, accepted: Accepted, new: Float[Array, "*b m r"], stored: Stored
    ) -> Float[Array, "*b m r"]:
        return choose(accepted, new, stored[0])

    def store(
        self, is_refresh: Bool[Array, ""], accepted: Accepted, chosen: Float[Array, "*b m r"], stored: Stored
    ) -> Stored:
        del is_refresh, accepted, stored
        return (chosen,)  # the step reads the stored array: memory holds only one


class _QuantizedProjector:
    """In eight bits, rounded to nearest at a refresh; other steps leave the codes as they are.

    Rounded columns are orthonormal to a few thousandths; those that a step reads are straightened first.
    (Q-GaLore, Zhang et al., arXiv 2407.08296, keeps projectors in four bits.)
    """

    def first(self, p: Float[Array, "*b m r"]) -> Stored:
        return quantize(p, axis=_AXIS)

    def load(self, *stored: Array) -> Float[Array, "*b m r"]:
        codes, scales = stored
        return straighten(dequantize(codes, scales, axis=_AXIS))

    def choose(
        self, accepted: Accepted, new: Float[Array, "*b m r"], stored: Stored
    ) -> Float[Array, "*b m r"]:
        del accepted, stored
        return new  # nobody reads a rejected step, and the old projector would be loaded once more

    def store(
        self, is_refresh: Bool[Array, ""], accepted: Accepted, chosen: Float[Array, "*b m r"], stored: Stored
    ) -> Stored:
        new = requantize(is_refresh, lambda p, _: p, chosen, stored, axis=_AXIS)
        return jax.tree.map(functools.partial(choose, accepted), new, stored)


_STORAGES: dict[str, ProjectorStorage] = {"float32": _ExactProjector(), "int8": _QuantizedProjector()}


def projector_storage(dtype: Any) -> ProjectorStorage:
    """The storage of a `projector_dtype`; `None` is float32.

    Raises:
      ValueError: `dtype` is neither float32 nor int8.
    """
    return check_dtype("projector_dtype", dtype, _STORAGES)


def projector_dtype_beside(momentum_dtype: Any) -> Any:
    """The dtype of the projectors beside a momentum: int8 if it is, else float32."""
    is_int8 = momentum_dtype is not None and jnp.dtype(momentum_dtype) == jnp.int8
    return jnp.int8 if is_int8 else jnp.float32
