"""The forward and the backward pass through the layers."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._core.xla import depend_on
from .division import Division
from .microbatches import Microbatches
from .turns import Carry, Step


class Layers(NamedTuple):
    """The layers of a model, in groups of `keep_every`.

    The forward pass keeps the input of the first layer of each group. When the backward pass comes to a
    group, it computes the inputs of the other layers of the group from it.
    """

    division: Division
    microbatches: Microbatches
    layer: Callable[..., Any]
    keep_every: int

    def forward(self, layers: Any, x: Any) -> tuple[Any, Any]:
        """The output of the last layer, and the input of each group."""

        def through_group(x, start):
            y = self._repeat(0, self.keep_every, lambda i, x: self._through(layers, start + i, x), x)
            return y, x

        starts = range(0, self.division.count, self.keep_every)
        if self.division.is_stacked:
            try:
                return jax.lax.scan(through_group, x, jnp.asarray(starts))
            except TypeError:
                _check_keeps_types(x, jax.eval_shape(lambda: self._through(layers, 0, x)))
                raise
        inputs = []
        for start in starts:
            x, kept = through_group(x, start)
            inputs.append(kept)
        return x, inputs

    def backward(self, step: Step, inputs: Any, dx: Any) -> Any:
        """Takes the step of every layer, from the last to the first.

        Args:
          step: of the optimizer.
          inputs: of each group.
          dx: the gradient of the last layer's output.

        Returns:
          The gradient of the first layer's input.
        """

        def of_group(group, carried):
            start = group * self.keep_every
            rows = self._inputs(carried[1].params, start, self._row(inputs, group))
            return self._count_down(
                self.keep_every,
                lambda i, carried: self._turn(step, start + i, self._row(rows, i), *carried),
                carried,
            )

        dx, carry = self._count_down(self.division.count // self.keep_every, of_group, (dx, step.carry()))
        step.carried(carry)
        return dx

    def _turn(self, step: Step, number: Any, x: Any, dx: Any, carry: Carry) -> tuple[Any, Carry]:
        """The step of one layer, and the gradient of its input."""
        _, gradient, dx = self.microbatches.pulled_back(self._part, self._own(carry.params, number), x, dx)
        # On a CPU the gradients of the parameters wait for that of the input, which reads the parameters: if
        # they were overwritten before, XLA would copy the whole stack for it.
        last = [leaf for leaf in jax.tree.leaves(dx) if leaf.size][-1:]
        gradient = jax.tree.map(lambda g: functools.reduce(depend_on, last, g), gradient)
        carry = step.with_layer(carry, number, gradient)
        return dx if self.division.is_stacked else step.after(carry, dx, number), carry

    def _part(self, own: Any, x: Any, batch: Any) -> Any:
        del batch
        return self.layer(own, x)

    def _own(self, layers: Any, number: Any) -> Any:
        """The parameters of one layer."""
        return self.division.one_layer(self.division.layer(layers, number))

    def _through(self, layers: Any, number: Any, x: Any) -> Any:
        return self.microbatches.outputs(self._part, self._own(layers, number), x)

    def _inputs(self, layers: Any, start: Any, x: Any) -> Any:
        """The input of each layer of a group, from that of its first layer."""

        def through(i, rows):
            x = self._through(layers, start + i - 1, self._row(rows, i - 1))
            if not self.division.is_stacked:
                return [*rows, x]
            return jax.tree.map(lambda row, y: row.at[i].set(y), rows, x)

        rows = [x]
        if self.division.is_stacked:
            rows = jax.tree.map(lambda x: jnp.zeros((self.keep_every, *x.shape), x.dtype).at[0].set(x), x)
        return self._repeat(1, self.keep_every, through, rows)

    def _row(self, rows: Any, number: Any) -> Any:
        if not self.division.is_stacked:
            return rows[number]
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), rows)

    def _repeat(self, first: int, stop: int, body: Callable[[Any, Any], Any], carried: Any) -> Any:
        """A loop, which is unrolled where layers are separate trees, and no loop for one turn."""
        if self.division.is_stacked and stop - first > 1:
            return jax.lax.fori_loop(first, stop, body, carried)
        for i in range(first, stop):
            carried = body(i, carried)
        return carried

    def _count_down(self, count: int, body: Callable[[Any, Any], Any], carried: Any) -> Any:
        """`body` with the numbers from `count - 1` to 0."""
        return self._repeat(0, count, lambda i, carried: body(count - 1 - i, carried), carried)


def _check_keeps_types(x: Any, y: Any) -> None:
    """Refuse a layer whose output could not be the input of the next one."""

    def of(tree):
        return [(jnp.shape(leaf), jnp.result_type(leaf).name) for leaf in jax.tree.leaves(tree)]

    if jax.tree.structure(x) != jax.tree.structure(y) or of(x) != of(y):
        raise TypeError(
            f"layer must return an x of the shapes and dtypes that it gets, {of(x)}, got {of(y)}; move what"
            " changes them to embed or head."
        )
