"""A part of the model on one microbatch after the other, and the sum of its gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._linalg.numerics import wide_dtype

# `(parameters, x, a microbatch) -> y`
Part = Callable[[Any, Any, Any], Any]


class Microbatches:
    """The microbatches of a step. With several, `x` and `y` have a first axis that counts them.

    Args:
      batch: whatever the model reads.
      count: how many microbatches there are. If more than one, the first axis of every array of `batch`
        counts them.

    Raises:
      ValueError: an array of `batch` does not have that axis.
    """

    def __init__(self, batch: Any, count: int):
        shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
        if count > 1 and any(shape[:1] != (count,) for shape in shapes):
            raise ValueError(
                f"with microbatches={count}, the first axis of every array of batch must have that size; got"
                f" shapes {shapes}."
            )
        self._batch, self._count = batch, count

    def outputs(self, part: Part, own: Any, x: Any) -> Any:
        """`y` of every microbatch."""
        if self._count == 1:
            return part(own, x, self._batch)
        return jax.lax.map(lambda row: part(own, *row), (x, self._batch))

    def pulled_back(self, part: Part, own: Any, x: Any, dy: Any = None) -> tuple[Any, Any, Any]:
        """`y`, the mean gradient of `own` over the microbatches, and the gradient of `x` in each of them.

        One microbatch after the other adds to the mean, in float32 at least.

        Args:
          part: a part of the model.
          own: its parameters.
          x: its input.
          dy: the gradient of `y`; `None` if `y` is the loss.
        """

        def one(x, dy, batch):
            y, pull = jax.vjp(lambda own, x: part(own, x, batch), own, x)
            return y, *pull(jnp.ones_like(y) if dy is None else dy)

        if self._count == 1:
            return one(x, dy, self._batch)

        def added(total, row):
            y, gradient, dx = one(*row)
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradient), (y, dx)

        start = jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(p)), own)
        total, (y, dx) = jax.lax.scan(added, start, (x, dy, self._batch))
        mean = jax.tree.map(lambda t, p: (t / self._count).astype(p.dtype), total, own)
        return y, mean, dx
