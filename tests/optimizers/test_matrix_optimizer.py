"""What all optimizers share: routing, AdamW for the rest, decay, skipping, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Dims

import gum_optax as go

from helpers import run

LEARNING_RATE, DECAY = 0.1, 0.01
SHAPES = {"mlp": {"kernel": (3, 6, 9), "bias": (9,)}, "embed": {"embedding": (7, 6)}}


def tree(seed):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jnp.float32(rng.normal(size=shape)), SHAPES, is_leaf=is_shape)


PARAMS = tree(0)
GRADIENTS = [tree(seed) for seed in range(1, 5)]


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


RULE = go.scale_by_muon()
COMPOSED = {
    "muon": (go.muon, {}, go.scale_by_muon(), go.shape_factor()),
    "jordan": (
        go.muon,
        {"nesterov": True, "consistent_rms": None, "momentum": 0.8, "orthogonalizer": go.polar},
        go.scale_by_muon(0.8, go.polar, nesterov=True),
        go.shape_factor(None),
    ),
    "trion": (go.trion, {"rank": 2}, go.scale_by_trion(2), go.shape_factor()),
    "dion": (go.dion, {"rank": 2, "key": 3}, go.scale_by_dion(2, key=3), go.fan_ratio),
    "cosmos": (go.cosmos, {"rank": 2}, go.scale_by_cosmos(2), 0.2),
}


@pytest.mark.parametrize(("make", "arguments", "rule", "scale"), COMPOSED.values(), ids=COMPOSED)
def test_an_optimizer_is_its_rule_and_its_scale(make, arguments, rule, scale):
    gradients = GRADIENTS[:2]
    composed = go.matrix_optimizer(rule, LEARNING_RATE, scale, weight_decay=DECAY)
    expected = run(make(LEARNING_RATE, weight_decay=DECAY, **arguments), gradients, PARAMS)
    assert_same(run(composed, gradients, PARAMS), expected)


# The rule is linear and stateless, so the update shows the input of the rule.
PLAIN = functools.partial(go.matrix_optimizer, optax.identity(), LEARNING_RATE)


def test_matrices_go_to_the_rule_and_all_other_leaves_to_adamw():
    updates, _ = run(PLAIN(0.5, weight_decay=DECAY), GRADIENTS, PARAMS)
    adamw, _ = run(optax.adamw(LEARNING_RATE, weight_decay=DECAY), GRADIENTS, PARAMS)
    for u, a, g in zip(updates, adamw, GRADIENTS, strict=True):
        for found, expected in ((u["mlp"]["bias"], a["mlp"]["bias"]), (u["embed"], a["embed"])):
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)
        step = 0.5 * g["mlp"]["kernel"] + DECAY * PARAMS["mlp"]["kernel"]
        np.testing.assert_allclose(u["mlp"]["kernel"], -LEARNING_RATE * step, rtol=1e-5)


def test_the_arguments_say_what_decays_and_what_is_a_matrix():
    mask = jax.tree.map(lambda _: False, PARAMS)
    (u, *_), _ = run(PLAIN(1.0, weight_decay=DECAY, weight_decay_mask=mask), GRADIENTS, PARAMS)
    np.testing.assert_allclose(u["mlp"]["kernel"], -LEARNING_RATE * GRADIENTS[0]["mlp"]["kernel"], rtol=1e-6)
    swapped = {"*/embedding": Dims(0, 1), "*/kernel": None}
    (u, *_), _ = run(PLAIN(1.0, weight_dimension_numbers=swapped, others=optax.set_to_zero()), GRADIENTS)
    embedding = GRADIENTS[0]["embed"]["embedding"]
    np.testing.assert_allclose(u["embed"]["embedding"], -LEARNING_RATE * embedding, rtol=1e-6)
    assert not u["mlp"]["kernel"].any()


def test_a_rule_of_ones_own_for_all_other_leaves_has_the_same_rate_and_decay():
    sign = optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates))
    (u, *_), _ = run(PLAIN(1.0, weight_decay=DECAY, others_rule=sign), GRADIENTS, PARAMS)
    step = jnp.sign(GRADIENTS[0]["mlp"]["bias"]) + DECAY * PARAMS["mlp"]["bias"]
    np.testing.assert_allclose(u["mlp"]["bias"], -LEARNING_RATE * step, rtol=1e-6)


@pytest.mark.parametrize("kernel", [(6, 9), (9, 6)])
def test_a_scale_may_be_a_function_of_fan_in_and_fan_out(kernel):
    params = {"kernel": jnp.ones(kernel)}
    (u,), _ = run(PLAIN(lambda fan_in, fan_out: 10 * fan_in + fan_out), [params])
    np.testing.assert_allclose(u["kernel"], -LEARNING_RATE * (10 * kernel[0] + kernel[1]), rtol=1e-6)


def spy(shapes):
    """A rule that notes the shapes that it sees, and doubles the step."""

    def double(updates, _):
        shapes.extend(x.shape for x in jax.tree.leaves(updates))
        return jax.tree.map(lambda x: 2 * x, updates)

    return optax.stateless(double)


def test_a_rule_sees_the_shorter_side_first_unless_it_asks_for_the_fans():
    def seen(**arguments):
        shapes = []
        params = {"kernel": jnp.ones((2, 9, 6))}
        tx = go.matrix_optimizer(spy(shapes), LEARNING_RATE, 1.0, **arguments)
        tx.update(params, tx.init(params))
        return set(shapes)

    assert seen() == {(2, 6, 9)}
    assert seen(wide=False) == {(2, 9, 6)}


def test_a_scale_may_be_a_rule_that_sees_steps_by_fan_in_and_fan_out():
    shapes = []
    params = {"kernel": jnp.ones((2, 9, 6)), "query": {"kernel": jnp.ones((8, 2, 3))}, "bias": jnp.ones(6)}
    dims = {"kernel": Dims(-2, -1), "query/kernel": Dims(0, (1, 2)), "bias": None}
    tx = go.matrix_optimizer(RULE, LEARNING_RATE, spy(shapes), weight_dimension_numbers=dims)
    plain = go.matrix_optimizer(RULE, LEARNING_RATE, 1.0, weight_dimension_numbers=dims)
    found, _ = tx.update(params, tx.init(params))
    expected, _ = plain.update(params, plain.init(params))
    assert sorted(set(shapes)) == [(2, 9, 6), (8, 6)]
    np.testing.assert_array_equal(found["bias"], expected["bias"])
    for of in (lambda tree: tree["kernel"], lambda tree: tree["query"]["kernel"]):
        np.testing.assert_allclose(of(found), 2 * of(expected), rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_leaf_whose_gradient_is_not_finite_stays_and_the_others_step(bad):
    tx = go.matrix_optimizer(go.scale_by_muon(), LEARNING_RATE, go.shape_factor(), weight_decay=DECAY)
    params = {name: {"kernel": PARAMS["mlp"]["kernel"]} for name in "ab"}
    broken = {name: {"kernel": GRADIENTS[0]["mlp"]["kernel"]} for name in "ab"}
    broken["a"]["kernel"] = broken["a"]["kernel"].at[1, 2, 3].set(bad)
    (u,), state = run(tx, [broken], params)
    assert not u["a"]["kernel"].any()
    assert np.isfinite(u["b"]["kernel"]).all()
    assert u["b"]["kernel"].any()
    (trace,) = [x for x in jax.tree.leaves(state, is_leaf=is_trace) if is_trace(x)]
    assert not trace.trace["a"]["kernel"].any()
    assert trace.trace["b"]["kernel"].any()
    assert int(go.metrics(state)["skipped_steps"]) == 1


def is_trace(x):
    return isinstance(x, optax.TraceState)


BAD = [
    (go.newton_schulz, 1.0, {}, TypeError, "rule must be an optax.GradientTransformation"),
    (RULE, "moonlight", {}, TypeError, "scale must be a number"),
    (RULE, None, {}, TypeError, "scale must be a number"),
    (RULE, -1.0, {}, ValueError, "scale must be at least 0, got -1.0"),
    (RULE, 1.0, {"weight_decay": -1}, ValueError, "weight_decay must be at least 0, got -1"),
    (RULE, 1.0, {"others": "adamw"}, TypeError, "others must be an optax.GradientTransformation"),
    (RULE, 1.0, {"others_rule": 0}, TypeError, "others_rule must be an optax.GradientTransformation"),
]


@pytest.mark.parametrize(("rule", "scale", "arguments", "error", "message"), BAD, ids=lambda x: str(x)[:30])
def test_bad_arguments_are_refused_at_construction(rule, scale, arguments, error, message):
    with pytest.raises(error, match=message):
        go.matrix_optimizer(rule, LEARNING_RATE, scale, **arguments)


def test_the_other_arguments_of_the_parts_are_refused_too():
    with pytest.raises(ValueError, match="learning_rate must be at least 0, got -1"):
        go.matrix_optimizer(RULE, -1, 1.0)
    with pytest.raises(TypeError, match="positional arguments"):
        go.matrix_optimizer(RULE, LEARNING_RATE, 1.0, DECAY)
    with pytest.raises(ValueError, match="consistent_rms must be at least 0, got -1"):
        go.shape_factor(-1)
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1, got 1"):
        go.scale_by_muon(1)
    with pytest.raises(TypeError, match=r"orthogonalizer must be a function such as .* got 0"):
        go.scale_by_muon(orthogonalizer=0)
    with pytest.raises(ValueError, match="momentum_dtype must be float32, bfloat16 or int8"):
        go.scale_by_muon(momentum_dtype="float16")
    with pytest.raises(TypeError, match=r"\['mlp'\]\['kernel'\] has dtype int32"):
        go.matrix_optimizer(RULE, LEARNING_RATE, 1.0).init({"mlp": {"kernel": jnp.ones((3, 4), jnp.int32)}})


@pytest.mark.parametrize("make", [go.galore, go.golore, go.swan, go.sinkgd])
def test_the_scale_of_an_optimizer_is_a_number(make):
    with pytest.raises(TypeError, match="scale must be a number"):
        make(LEARNING_RATE, scale=go.fan_ratio)


def test_under_inject_hyperparams_a_scale_is_a_hyperparameter():
    make = optax.inject_hyperparams(functools.partial(go.matrix_optimizer, optax.identity(), LEARNING_RATE))
    tx = make(scale=lambda count: 1.0 + count)
    updates, _ = run(tx, GRADIENTS[:1] * 2, PARAMS)
    kernel = GRADIENTS[0]["mlp"]["kernel"]
    for factor, u in zip((1.0, 2.0), updates, strict=True):
        np.testing.assert_allclose(u["mlp"]["kernel"], -LEARNING_RATE * factor * kernel, rtol=1e-6)


def test_lion_in_a_subspace_is_an_optimizer_whose_state_is_as_small_as_the_rank():
    rule = go.low_rank(optax.scale_by_lion(), rank=2, period=200)
    tx = go.matrix_optimizer(rule, 1e-4, 1.0, weight_decay=0.1)
    params = {"mlp": {"kernel": jnp.ones((8, 6))}, "bias": jnp.ones(3)}
    (u,), state = run(tx, [params], params)
    assert float(jnp.vdot(u["mlp"]["kernel"], params["mlp"]["kernel"])) < 0
    assert [x.shape for x in jax.tree.leaves(state) if x.ndim == 2] == [(6, 2), (2, 8)]


def test_scale_by_shape_is_a_step_times_the_shape_factor():
    params = {"kernel": jnp.ones((4, 9))}
    for consistent_rms in (0.2, 0.5, None):
        (u,), _ = run(go.scale_by_shape(go.LAST_TWO, consistent_rms), [params])
        np.testing.assert_allclose(u["kernel"], go.shape_factor(consistent_rms)(4, 9), rtol=1e-6)
    assert go.shape_factor()(4, 9) == pytest.approx(0.6)
    assert go.shape_factor(None)(4, 9) == pytest.approx(1.5)
    assert go.shape_factor(None)(9, 4) == 1
    assert go.fan_ratio(9, 4) == pytest.approx(2 / 3)
