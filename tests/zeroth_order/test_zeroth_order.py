"""Zeroth order: exact slopes of a quadratic loss, means over draws, and the memory of inference."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go
from gum_optax._zeroth_order.directions import drawn

SHAPES = {"stack": (3, 6, 9), "matrix": (7, 5), "bias": (4,), "number": ()}
LOW_RANK = go.low_rank_directions(2, 5)
DIRECTIONS = pytest.mark.parametrize("directions", [go.gaussian, LOW_RANK], ids=["gaussian", "low rank"])


@pytest.fixture
def params(rng):
    return {name: jnp.float32(rng.normal(size=x)) for name, x in SHAPES.items()}


@pytest.fixture
def loss(rng):
    """Quadratic, so that the slope between two points is exact whatever their distance."""
    targets = {name: jnp.float32(rng.normal(size=x)) for name, x in SHAPES.items()}

    def of(params):
        return sum(jnp.sum((params[name] - targets[name]) ** 2) for name in SHAPES)

    return of


def inner(a, b):
    return sum(float(np.sum(np.float64(x) * np.float64(b[name]))) for name, x in a.items())


@DIRECTIONS
def test_the_slope_is_that_along_the_direction_that_was_drawn(params, loss, directions):
    z, gradient = drawn(params, 3, 7, 0, directions), jax.grad(loss)(params)
    slope = inner(gradient, z)
    for epsilon in (1e-2, 0.5, None):
        value, found = jax.jit(
            lambda p, e=epsilon: go.estimate(loss, p, 3, 7, epsilon=e, directions=directions)
        )(params)
        jax.tree.map(lambda g, d: np.testing.assert_allclose(g, slope * d, rtol=2e-3, atol=1e-3), found, z)
        spread = 0 if epsilon is None else epsilon**2 * inner(z, z)
        assert float(value) == pytest.approx(float(loss(params)) + spread, rel=1e-5)
    project = jax.jit(lambda p: go.project_loss(loss, p, 3, 7, epsilon=0.1, directions=directions))
    value, found, back = project(params)
    assert float(found) == pytest.approx(slope, rel=1e-3)
    chex.assert_trees_all_close(back, params, atol=1e-6)


@DIRECTIONS
def test_walking_is_sgd_on_the_estimate_to_rounding(params, loss, directions):
    _, slope, back = go.project_loss(loss, params, 0, 2, directions=directions)
    found = go.walk(back, 0, -0.1 * slope, 2, directions=directions)
    _, gradient = go.estimate(loss, params, 0, 2, directions=directions)
    expected = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, gradient))
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-3)  # slopes of float32 losses
    # With the slope given, all that differs is which of the product and the sum are rounded.
    exact = jax.tree.map(lambda x, d: x + (-0.1 * slope) * d, back, drawn(params, 0, 2, 0, directions))
    for name in SHAPES:
        step = jnp.abs(exact[name] - back[name])
        ulp = np.spacing(np.maximum(np.abs(exact[name]), step))
        assert (np.abs(found[name] - exact[name]) <= 2 * ulp).all(), name


@DIRECTIONS
def test_several_queries_are_the_mean_along_their_directions(params, loss, directions):
    _, found = go.estimate(loss, params, 0, 5, epsilon=None, queries=3, directions=directions)
    gradient = jax.grad(loss)(params)
    zs = [drawn(params, 0, 5, query, directions) for query in range(3)]
    expected = jax.tree.map(
        lambda *xs: sum(inner(gradient, z) * x for z, x in zip(zs, xs, strict=True)) / 3, *zs
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-3)
    if directions is LOW_RANK:  # they share the subspace of the period
        assert np.linalg.matrix_rank(found["matrix"], tol=1e-3) == 2


@pytest.mark.parametrize(
    ("directions", "square"), [(go.gaussian, 12 * 20 + 2), (LOW_RANK, 240 * (1 + 2 / 4))]
)
def test_the_mean_is_the_gradient_and_the_variance_is_that_of_theory(rng, directions, square):
    """Over 20,000 steps, with fresh subspaces."""
    gradient = jnp.float32(rng.normal(size=(12, 20)))
    fresh = directions if directions is go.gaussian else go.low_rank_directions(2, 1)

    @jax.jit
    @jax.vmap
    def estimates(step):
        found = go.estimate(
            lambda p: jnp.sum(p["w"] * gradient),
            {"w": jnp.zeros((12, 20))},
            0,
            step,
            epsilon=None,
            directions=fresh,
        )
        return found[1]["w"]

    found = np.float64(estimates(jnp.arange(20_000)))
    error = found.mean(0) - np.float64(gradient)
    z_scores = error / (found.std(0) / np.sqrt(len(found)))
    assert abs(z_scores.mean()) < 4 / np.sqrt(z_scores.size)
    assert 0.8 < z_scores.std() < 1.2
    squares = np.sum(found**2, (1, 2)) / float(jnp.sum(gradient**2))
    assert abs(squares.mean() - square) < 4 * squares.std() / np.sqrt(len(squares))


def test_a_low_rank_direction_stays_in_its_subspace_for_a_period(params):
    ranks = []
    for steps in (range(4), (4, 5)):
        z = np.stack([drawn(params, 1, step, 0, LOW_RANK)["stack"] for step in steps])
        blocks = np.concatenate(list(z), axis=-1)  # of one stack, side by side: the span of U
        ranks.append(np.linalg.matrix_rank(blocks, tol=1e-3).tolist())
    assert ranks == [[2, 2, 2], [4, 4, 4]]
    assert len({float(x) for x in z[0, :, 0, 0]}) == 3  # every matrix of a stack has its own


def test_a_leaf_has_its_direction_whatever_leaves_stand_beside_it(params):
    alone = {"matrix": params["matrix"]}
    for directions in (go.gaussian, LOW_RANK):
        whole, one = (drawn(tree, 0, 3, 0, directions)["matrix"] for tree in (params, alone))
        np.testing.assert_array_equal(whole, one)


def test_normal_numbers_are_normal(params):
    z = np.concatenate(
        [np.ravel(x) for x in drawn({"w": jnp.zeros((50, 40, 50))}, 0, 0, 0, go.gaussian).values()]
    )
    count = z.size
    for moment, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(z**moment) - mean) < 4 * np.sqrt(variance / count), moment
    assert len(np.unique(z)) > 0.98 * count


def test_a_loss_that_is_not_finite_moves_nothing(params):
    def bad(p):
        return jnp.sum(p["matrix"]) * jnp.nan

    _, slope, back = go.project_loss(bad, params, 0)
    assert float(slope) == 0
    chex.assert_trees_all_close(back, params, atol=1e-6)


def test_bfloat16_is_estimated_and_not_walked(params, loss):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    _, gradient = go.estimate(lambda p: loss(jax.tree.map(lambda x: x.astype(jnp.float32), p)), half, 0)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(gradient))
    with pytest.raises(ValueError, match="bfloat16: walking there and back"):
        go.project_loss(loss, half, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"epsilon": 0.0}, "epsilon must be at least"), ({"step": 0.5}, "step must be an integer")],
)
def test_bad_arguments_are_refused(params, loss, arguments, message):
    for function in (go.estimate, go.project_loss):
        with pytest.raises((TypeError, ValueError), match=message):
            function(loss, params, 0, **arguments)
    with pytest.raises(ValueError, match="queries must be at least 1"):
        go.estimate(loss, params, 0, queries=0)


@pytest.mark.parametrize("function", [go.estimate, go.project_loss])
def test_a_loss_is_a_number_and_leaves_are_floating_point(params, function):
    with pytest.raises(ValueError, match=r"loss must return a number, got shape \(5,\)"):
        function(lambda p: p["matrix"][0], params, 0)
    with pytest.raises(TypeError, match="loss must return a number alone, got a tuple"):
        function(lambda p: (p["number"], 1), params, 0)
    with pytest.raises(TypeError, match="is int32, and only real floating-point"):
        function(lambda p: p["number"], params | {"count": jnp.arange(3)}, 0)
    for directions in ("gaussian", go.low_rank_directions):
        with pytest.raises(TypeError, match="directions must be"):
            function(lambda p: p["number"], params, 0, directions=directions)


def test_float64_is_moved_in_float64():
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))}
        np.testing.assert_array_equal(go.walk(params, 0, 0.0)["w"], params["w"])
        exact, near = (
            go.estimate(lambda p: jnp.sum(p["w"] ** 2), params, 0, epsilon=e)[1]["w"] for e in (None, 1e-6)
        )
        assert exact.dtype == jnp.float64
        np.testing.assert_allclose(near, exact, rtol=1e-6)


def test_empty_leaves_stay(params):
    empty = {"none": jnp.zeros((2, 0, 3)), "row": jnp.zeros((0,))}
    for directions in (go.gaussian, LOW_RANK):
        found = go.walk(params | empty, 0, 0.1, directions=directions)
        chex.assert_trees_all_equal({name: found[name] for name in empty}, empty)
        _, gradient = go.estimate(lambda p: p["number"] ** 2, params | empty, 0, directions=directions)
        assert gradient["none"].shape == (2, 0, 3)


def test_an_optimizer_learns_by_estimates(params, loss):
    tx = go.galore_muon(0.1, 2, 5)

    @jax.jit
    def step(params, state, i):
        _, gradients = go.estimate(loss, params, 0, i, queries=20)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state, first = tx.init(params), float(loss(params))
    for i in range(150):
        params, state = step(params, state, i)
    assert float(loss(params)) < 0.6 * first


# A scanned model of sixteen layers.
LAYERS, WIDTH = 16, 256


def scanned(params, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jnp.mean(jax.lax.scan(layer, x, params["layers"])[0] ** 2)


def temporaries(step):
    shapes = {"layers": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)}
    x = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32)
    program = jax.jit(step, donate_argnums=0).lower(shapes, x, 0).compile()
    layer = 4 * WIDTH**2
    return program.memory_analysis().temp_size_in_bytes / layer


@DIRECTIONS
def test_a_step_needs_the_memory_of_inference(directions):
    """In layers: one for a product in a subspace; a plain two-point step holds two copies of the model."""

    def inference(params, x, step):
        return scanned(params, x) + step

    def walking(params, x, step):
        loss = functools.partial(scanned, x=x)
        value, slope, params = go.project_loss(loss, params, 0, step, directions=directions)
        return go.walk(params, 0, -0.1 * slope, step, directions=directions), value

    def plain(params, x, step):
        loss = functools.partial(scanned, x=x)
        value, gradient = go.estimate(loss, params, 0, step, directions=directions)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

    more = temporaries(walking) - temporaries(inference)
    assert more <= (0.05 if directions is go.gaussian else 1.05)  # 0.03 are activations
    assert temporaries(plain) > 1.9 * LAYERS
