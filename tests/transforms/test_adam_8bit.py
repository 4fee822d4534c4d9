"""Adam with moments of eight bits, beside optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gum_optax as go
from gum_optax._core.acceptance import Acceptance
from gum_optax._core.context import MatrixContext
from gum_optax._linalg.quantize import SQUARES, dequantize

from helpers import run

SHAPES = {"table": (64, 96), "head": (64, 130), "vector": (4096,), "small": (3, 5), "narrow": (2000, 4)}
CODED = ("table", "head", "vector")


def gradients(steps, seed=0):
    """Gradients whose sizes differ by rows and columns, as those of tokens do."""
    rng = np.random.default_rng(seed)
    sizes = {name: 10.0 ** rng.uniform(-2, 0, size=shape) for name, shape in SHAPES.items()}
    return [
        {name: jnp.float32(size * (0.5 + rng.normal(size=size.shape))) for name, size in sizes.items()}
        for _ in range(steps)
    ]


def test_the_steps_are_adams_up_to_the_codes_and_small_leaves_are_exact():
    data = gradients(20)
    found, state = run(go.scale_by_adam_8bit(0.9, 0.99), data)
    expected, _ = run(optax.scale_by_adam(0.9, 0.99), data)
    for name in SHAPES:
        gap = np.abs(found[-1][name] - expected[-1][name]) / np.sqrt(np.mean(expected[-1][name] ** 2))
        if name in CODED:
            assert np.sqrt(np.mean(gap**2)) < 0.15
        else:
            assert gap.max() < 1e-5
    np.testing.assert_allclose(found[0]["table"], expected[0]["table"], rtol=1e-5)
    assert {name: (state.mu[name].dtype, state.nu[name].dtype) for name in CODED} == dict.fromkeys(
        CODED, (jnp.float8_e4m3fn, jnp.uint8)
    )


def test_squares_that_move_by_less_than_a_code_arrive_on_average():
    """At `b2 = 0.999` a step moves them by a thousandth, and neighbouring codes are an eighth apart."""
    rule = go.scale_by_adam_8bit(0.9, 0.999)
    g = jnp.ones((64, 128)).at[:, 0].set(2.0)

    def step(state, _):
        return rule.update(g, state)[1], None

    state, _ = jax.lax.scan(step, rule.init(g), length=500)
    v = np.asarray(dequantize(state.nu, state.nu_scales, SQUARES))[:, 1:]
    exact = 1 - 0.999**500
    assert abs(v.mean() - exact) < 4 * v.std() / np.sqrt(v.size)
    assert v.std() < 0.3 * exact


def test_at_most_27_hundredths_of_adams_state():
    params = {"embedding": jax.ShapeDtypeStruct((512, 192), jnp.float32)}

    def size(tx):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))

    assert size(go.adamw_8bit(0.1)) <= 0.27 * size(optax.adamw(0.1))


def test_it_updates_embedding_and_head_beside_gum(rng):
    shapes = {"embed": (80, 64), "kernel": (3, 8, 12), "bias": (12,)}
    params = {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    data = [{name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()} for _ in range(3)]
    data[1]["embed"] = data[1]["embed"].at[0, 0].set(jnp.nan)
    others = go.adamw_8bit(0.1, weight_decay=0.1)
    tx = go.gum(
        0.1,
        2,
        3,
        momentum_dtype="int8",
        others=others,
        weight_dimension_numbers={"embed": None, "bias": None, "kernel": go.LAST_TWO},
    )
    found, state = run(tx, data, params)
    alone, _ = run(
        others,
        [{"embed": g["embed"], "bias": g["bias"]} for g in (data[0], data[2])],
        {"embed": params["embed"], "bias": params["bias"]},
    )
    assert not found[1]["embed"].any()
    assert found[1]["kernel"].any()
    np.testing.assert_allclose(found[0]["embed"], alone[0]["embed"], rtol=1e-5)
    assert all(np.isfinite(np.float32(x)).all() for x in jax.tree.leaves(state))
    assert go.memory_report(tx, params).state["nu"] == 80 * 64 + 4 * 12


def test_a_rejected_step_keeps_all_codes():
    first, second = gradients(2)
    rule = go.scale_by_adam_8bit()
    _, state = jax.jit(rule.update)(first, rule.init(first))

    @jax.jit
    def rejected(g, state):
        return rule.update(g, state, context=MatrixContext(accept=Acceptance(jnp.asarray(False))))

    _, new = rejected(second, state)
    jax.tree.map(np.testing.assert_array_equal, new._replace(count=state.count), state)


def test_a_saved_state_goes_on_to_the_bit(tmp_path):
    data = gradients(4)
    tx = go.adamw_8bit(0.1, weight_decay=0)
    whole, expected = run(tx, data)
    _, half = run(tx, data[:2])
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "state", half)
    checkpointer.wait_until_finished()
    state = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, data[0]))
    for g, step in zip(data[2:], whole[2:], strict=True):
        updates, state = jax.jit(tx.update)(g, state)
        jax.tree.map(np.testing.assert_array_equal, updates, step)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match=r"leaf \['phase'\] is complex64"):
        go.scale_by_adam_8bit().init({"phase": jnp.ones(3, jnp.complex64)})
    with pytest.raises(ValueError, match="b2 must be at least 0 and below 1"):
        go.scale_by_adam_8bit(b2=1.0)
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        go.adamw_8bit(0.1, weight_decay=-1)
