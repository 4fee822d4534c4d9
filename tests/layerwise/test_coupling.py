"""Where the numbers of a trace come from."""

import jax
import jax.numpy as jnp

from gum_optax._layerwise.coupling import Origin, origins_of

HEAD = Origin(frozenset({"head"}))


def of_layers(axis):
    return Origin(frozenset({"layers"}), axis)


def test_a_scan_over_another_axis_keeps_that_of_the_layers():
    rows = jax.ShapeDtypeStruct((3, 4), jnp.float32)

    def doubled(a):
        return jax.lax.scan(lambda c, row: (c, 2 * row), 0.0, a)[1]

    assert origins_of(doubled, (rows,), (of_layers(1),)) == of_layers(1)
    assert origins_of(doubled, (rows,), (of_layers(0),)) == of_layers(None)


def test_what_a_scan_carries_depends_on_its_rows_and_its_constants():
    rows, constant = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 4), (2,)))

    def summed(a, b):
        return jax.lax.scan(lambda c, row: (c + row * b.sum(), 2 * row), jnp.zeros(4), a)

    carried, doubled = origins_of(summed, (rows, constant), (of_layers(1), HEAD))
    assert carried == Origin(frozenset({"head", "layers"}))
    assert doubled == of_layers(1)
