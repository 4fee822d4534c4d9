"""The leaves beside the matrices of Scion and AdaLomo, each by the reading of the whole tree."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

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


WIDTH, VOCABULARY = 4, 16
HEADS = {
    "Flax": {"lm_head": {"kernel": (WIDTH, VOCABULARY)}},
    "PyTorch's order": {"lm_head": {"weight": (VOCABULARY, WIDTH)}},
    "a stack": {"heads": {"lm_head": {"weight": (3, VOCABULARY, WIDTH)}}},
    "a side as long as the vocabulary": {"last": {"weight": (VOCABULARY, WIDTH)}},
}


@pytest.mark.parametrize("head", HEADS)
def test_the_step_of_a_head_is_divided_by_its_width(rng, head):
    shapes = {"embed": {"embedding": (VOCABULARY, WIDTH)}, "up": {"kernel": (WIDTH, 8)}} | HEADS[head]
    gradients = gradients_of(rng, shapes)
    steps = first_step(go.scion(1.0), gradients)
    for name in HEADS[head]:
        jax.tree.map(
            lambda u, g: np.testing.assert_allclose(u, -EDGE / WIDTH * np.sign(g), rtol=1e-6),
            steps[name],
            gradients[name],
        )


def test_the_step_of_an_equinox_head_is_divided_by_its_width():
    class Model(eqx.Module):
        up: eqx.nn.Linear
        lm_head: eqx.nn.Linear
        conv_head: eqx.nn.Conv2d

    keys = jax.random.split(jax.random.key(0), 3)
    model = Model(
        eqx.nn.Linear(WIDTH, 8, key=keys[0]),
        eqx.nn.Linear(WIDTH, VOCABULARY, key=keys[1]),
        eqx.nn.Conv2d(WIDTH, 5, 3, key=keys[2]),
    )
    gradients = eqx.filter(model, eqx.is_inexact_array)
    steps = first_step(go.scion(1.0), gradients)
    for own, fan_in in (("lm_head", WIDTH), ("conv_head", 9 * WIDTH)):
        g, u = getattr(gradients, own).weight, getattr(steps, own).weight
        np.testing.assert_allclose(u, -EDGE / fan_in * np.sign(g), rtol=1e-6)


def test_a_row_of_a_head_of_the_two_orders_has_the_same_step(rng):
    """With `row_lmo` a row is an output, wherever the outputs stand."""
    g = np.float32(rng.normal(size=(VOCABULARY, WIDTH)))
    found = [
        first_step(go.scion(1.0, head_lmo=go.row_lmo), {"lm_head": leaf})["lm_head"]
        for leaf in ({"weight": g}, {"kernel": g.T})
    ]
    np.testing.assert_allclose(found[0]["weight"], found[1]["kernel"].T, rtol=1e-6)


class Named(nnx.Module):
    """A head called `weight` whose axes say that the vocabulary is last."""

    def __init__(self):
        told = {"out_sharding": ("embed", "vocab"), "eager_sharding": False}
        self.weight = nnx.Param(jnp.ones((WIDTH, VOCABULARY)), **told)


def test_an_nnx_head_keeps_the_reading_of_its_axis_names():
    """`nnx.Optimizer` shows the names to `init` only."""
    model = Named()
    optimizer = nnx.Optimizer(model, go.scion(1.0), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: jnp.sum(model.weight**2))(model))
    np.testing.assert_allclose(model.weight, 1 - EDGE / WIDTH, rtol=1e-6)


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
