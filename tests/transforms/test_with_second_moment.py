"""A second moment that starts above zero: Adam in NumPy, in a subspace, and after restarts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import run


def adam_steps(gradients, start, b1=0.9, b2=0.99, eps=1e-8):
    m, v, out = 0.0, start, []
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        out.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
    return out


def moments(state):
    return optax.tree.get(state, "nu")


def ones(key, shape, fans):
    del key
    return jnp.full(shape, fans)


@pytest.fixture
def gradients(rng):
    shapes = {"w": (3, 6, 9), "b": (5,)}
    return [{name: jnp.float32(rng.normal(size=x)) for name, x in shapes.items()} for _ in range(6)]


def test_it_is_adam_from_another_start(gradients):
    tx = go.with_second_moment(optax.scale_by_adam(b2=0.99), ones)
    found, _ = run(tx, gradients)
    for name, start in (("w", 15.0), ("b", 0.0)):
        expected = adam_steps([np.float64(g[name]) for g in gradients], start)
        np.testing.assert_allclose([u[name] for u in found], expected, rtol=1e-5, atol=1e-7)


def test_a_start_of_zero_is_the_inner_rule_to_the_bit(gradients):
    for inner in (optax.scale_by_adam(), optax.adamw(0.1), optax.chain(optax.scale_by_belief())):
        found, expected = (run(tx, gradients) for tx in (zero(inner), inner))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def zero(inner):
    return go.with_second_moment(inner, go.xavier_squares(0.0))


def test_xaviers_squares_have_the_mean_of_the_code():
    (v,) = (go.xavier_squares(3.0)(jax.random.key(0), (200, 300), 500) for _ in range(1))
    expected = 3.0 * 2 / 500
    # χ²₁ has variance 2.
    assert abs(float(v.mean()) / expected - 1) < 4 * np.sqrt(2 / v.size)
    assert float(v.min()) >= 0


def low_rank(start, **arguments):
    return go.low_rank(go.with_second_moment(optax.scale_by_adam(), start), 2, 3, **arguments)


def test_in_a_subspace_the_fans_are_those_of_the_full_weight(gradients):
    params = {"wide": gradients[0]["w"], "narrow": jnp.ones((2, 9))}
    state = low_rank(ones).init(params)
    assert moments(state.low)["wide"].shape == (3, 2, 9)
    assert (moments(state.low)["wide"] == 6 + 9).all()
    assert (moments(state.full)["narrow"] == 2 + 9).all()


def test_a_restart_starts_there_again(gradients):
    rule = low_rank(ones, on_refresh=go.restart)
    matrices = [{"w": g["w"]} for g in gradients]
    _, state = run(rule, matrices[:4])  # one step into the second period
    decayed = moments(state.low)["w"] - 0.999 * 15
    assert (jnp.abs(decayed) < 0.1).all()
    assert (decayed >= -1e-5).all()
    _, kept = run(low_rank(ones), matrices[:4])
    assert (moments(kept.low)["w"] < 0.9971 * 15 + 0.2).all()


def test_slots_start_at_the_fans_of_their_matrices(gradients):
    inner = go.with_second_moment(optax.scale_by_adam(), ones)
    params = {"w": gradients[0]["w"]}
    state = go.unbiased_low_rank(inner, 2, 3, 0.4).init(params)
    found = [x for x in jax.tree.leaves(state) if jnp.shape(x)[-2:] in ((2, 9), (6, 9)) and (x == 15).all()]
    assert {x.shape[-2:] for x in found} == {(2, 9), (6, 9)}


def test_matrices_of_one_shape_start_alike_and_another_key_starts_otherwise():
    params = {"stack": jnp.ones((3, 4, 5)), "one": jnp.ones((4, 5))}
    first, second = (
        moments(go.with_second_moment(optax.scale_by_adam(), key=k).init(params)) for k in (0, 1)
    )
    for block in first["stack"]:
        np.testing.assert_array_equal(block, first["one"])
    assert (first["one"] != second["one"]).all()


def test_a_rule_without_second_moment_is_refused():
    for inner in (optax.trace(0.9), go.scale_by_adam_8bit()):
        with pytest.raises(ValueError, match="with_second_moment needs a"):
            go.with_second_moment(inner).init({"w": jnp.ones((600, 600))})
    with pytest.raises(ValueError, match="scale must be at least 0"):
        go.xavier_squares(-1.0)


def test_each_of_several_adams_starts_at_the_fans_of_its_own_leaves():
    labels = {"x": "b", "y": "a", "bias": "a"}
    adams = optax.partition({"a": optax.adamw(1e-3), "b": optax.adamw(1e-4)}, labels)
    params = {"x": jnp.ones((10, 10)), "y": jnp.ones((2, 2)), "bias": jnp.ones(3)}
    state = go.with_second_moment(adams, ones).init(params)
    found = {x.shape: float(x.max()) for x in jax.tree.leaves(state) if x.ndim == 2 and x.max() > 0}
    assert found == {(10, 10): 20, (2, 2): 4}
    go.with_second_moment(optax.adam(1e-3)).init({"empty": jnp.ones((0, 0)), "number": 1.0})


def test_a_parameter_may_be_called_nu():
    class Model(NamedTuple):
        nu: jax.Array

    state = go.with_second_moment(optax.scale_by_adam(), ones).init(Model(jnp.ones((2, 3))))
    assert (state.mu.nu == 0).all()
    assert (state.nu.nu == 5).all()
