"""The leaves beside the matrices of Scion and AdaLomo, each by the reading of the whole tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import run

RADIUS, EDGE = 50.0, 3000.0


def gradients_of(rng, shapes):
    return jax.tree.map(
        lambda shape: np.float32(rng.normal(size=shape)), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def first_step(tx, gradients, params=None):
    (updates,), _ = run(tx, [gradients], params)
    return updates


def unit_rows(g):
    return g / np.sqrt(np.mean(np.square(g), axis=-1, keepdims=True))


def test_a_stacked_vector_is_read_beside_the_matrices(rng):
    """Only the kernel beside it says that `mix` has a vector for each layer: without it, it is a matrix."""
    gradients = gradients_of(rng, {"layers": {"up": {"kernel": (12, 4, 8)}, "mix": (12, 8)}})
    params = jax.tree.map(lambda g: np.float32(np.arange(g.size).reshape(g.shape) / g.size), gradients)
    g, w = gradients["layers"]["mix"], params["layers"]["mix"]
    found = first_step(go.scion(1.0), gradients)["layers"]["mix"]
    np.testing.assert_allclose(found, -RADIUS * unit_rows(0.1 * g), rtol=1e-5)
    # The first second moment is the squared gradient, and each layer has a size of its own.
    found = first_step(go.adalomo(1.0), gradients, params)["layers"]["mix"]
    sizes = np.maximum(np.sqrt(np.mean(w**2, axis=-1, keepdims=True)), 1e-3)
    np.testing.assert_allclose(found, -np.sign(g) * sizes, rtol=1e-4)


def test_an_excluded_matrix_is_one_of_all_other_leaves(rng):
    gradients = gradients_of(rng, {"gate": {"kernel": (4, 8)}, "up": {"kernel": (4, 8)}})
    tx = go.scion(1.0, weight_dimension_numbers={"gate/*": None})
    np.testing.assert_allclose(
        first_step(tx, gradients)["gate"]["kernel"],
        -RADIUS * unit_rows(gradients["gate"]["kernel"]),
        rtol=1e-5,
    )


def test_an_excluded_table_is_a_table(rng):
    gradients = gradients_of(rng, {"embedding": (16, 4), "up": {"kernel": (4, 8)}})
    tx = go.scion(1.0, weight_dimension_numbers={"embedding*": None, "*": go.LAST_TWO})
    step = first_step(tx, gradients)["embedding"]
    np.testing.assert_allclose(step, -EDGE / 4 * np.sign(gradients["embedding"]), rtol=1e-6)


@pytest.mark.parametrize("make", [go.scion, go.adalomo])
def test_a_leaf_that_is_complex_is_refused_by_name(make):
    with pytest.raises(TypeError, match=r"leaf \['phase'\] is complex.*others=optax.adamw"):
        make(0.1).init({"phase": jnp.ones(3, jnp.complex64), "up": jnp.ones((4, 8))})


def test_the_state_has_the_three_groups():
    """A saved state of before goes on: which rule is given which axes changes nothing in it."""
    params = {"embedding": jnp.ones((16, 4)), "lm_head": {"weight": jnp.ones((16, 4))}, "scale": jnp.ones(4)}
    state = go.adalomo(0.1).init(params | {"up": jnp.ones((4, 8))})
    others = state.inner.inner_states["others"].inner_state[0]
    assert isinstance(others, optax.transforms.PartitionState)
    assert set(others.inner_states) == {"tables", "heads", "vectors"}
