"""Metrics of a state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import run


def test_metrics_are_what_the_last_step_did(rng):
    g = [{"w": np.float32(rng.normal(size=(6, 4, 7)))} for _ in range(7)]
    tx = optax.chain(optax.clip(10.0), go.gum(0.1, rank=2, period=3, full_rank_fraction=0.3, key=4))
    _, state = run(tx, g)
    found = go.metrics(state)
    inner = state[1].inner.inner_states["matrices"].inner_state[0]
    p = inner.projectors["w"]
    share = float(jnp.sum((p.mT @ g[-1]["w"]) ** 2) / jnp.sum(g[-1]["w"] ** 2))
    np.testing.assert_allclose(found["captured_energy"], share, rtol=1e-5)
    np.testing.assert_allclose(found["residual_share"], np.sqrt(1 - share), rtol=1e-5)
    residual = g[-1]["w"] - p @ (p.mT @ g[-1]["w"])
    np.testing.assert_allclose(
        found["residual_share"], jnp.linalg.norm(residual) / np.linalg.norm(g[-1]["w"]), rtol=1e-4
    )
    assert int(found["refresh_count"]) == 3
    np.testing.assert_allclose(found["realised_fraction"], 2 / 6)
    np.testing.assert_array_equal(
        [found["sampled/4x7/0"], found["sampled/4x7/1"]], go.draw(inner.key, jnp.int32(2), "4x7", 6, 2)
    )
    assert int(found["skipped_steps"]) == 0
    assert all(jnp.ndim(x) == 0 for x in found.values())


def test_metrics_come_out_of_a_jitted_step_and_of_any_state():
    tx = go.galore_muon(0.1, rank=2)
    params = {"w": jnp.ones((4, 7))}
    state = tx.init(params)
    found = jax.jit(lambda g, s: go.metrics(tx.update(g, s)[1]))(params, state)
    assert set(found) == {"captured_energy", "residual_share", "refresh_count", "skipped_steps"}
    np.testing.assert_allclose(found["captured_energy"], 1, rtol=1e-5)  # a matrix of ones has rank one
    assert go.metrics(optax.adam(0.1).init(params)) == {}


def test_no_gradient_has_no_energy_and_no_projected_block_no_share():
    _, state = run(go.galore_muon(0.1, rank=2), [{"w": jnp.zeros((4, 7))}])
    assert float(go.metrics(state)["captured_energy"]) == 0
    _, state = run(go.galore_muon(0.1, rank=2), [{"w": jnp.ones((2, 7))}])
    assert set(go.metrics(state)) == {"skipped_steps"}


def test_an_optimizer_is_no_state():
    with pytest.raises(TypeError, match="metrics reads the state of an optimizer, got the optimizer: pass"):
        go.metrics(go.gum(1e-3))


@pytest.mark.parametrize("contained", [lambda state: state, lambda state: {"step": 3, "opt_state": state}])
def test_each_of_several_low_rank_rules_has_its_own_metrics(rng, contained):
    params = {name: np.float32(rng.normal(size=(4, 6, 9))) for name in ("near", "far")}
    rules = {"a": go.gum(0.1, rank=2, full_rank_fraction=0.3), "b": go.galore_muon(0.1, rank=5)}
    tx = optax.chain(optax.partition(rules, {"near": "a", "far": "b"}), optax.scale(1.0))
    _, state = run(tx, [params] * 2, params)
    found = go.metrics(contained(state))
    shares = ("captured_energy", "residual_share", "refresh_count")
    own = {"a/realised_fraction", "a/sampled/6x9/0"}
    assert found.keys() == {"skipped_steps"} | own | {f"{rule}/{name}" for rule in "ab" for name in shares}
    for rule, name in (("a", "near"), ("b", "far")):
        _, alone = run(rules[rule], [{name: params[name]}] * 2)
        for key, value in go.metrics(alone).items():
            if key in shares:
                np.testing.assert_allclose(found[f"{rule}/{key}"], value, rtol=1e-5)


def test_the_metrics_of_several_runs_are_those_of_each_run():
    tx = go.gum(0.1, rank=2, full_rank_fraction=0.25)
    params = {"w": jnp.ones((8, 4, 7))}
    single = go.metrics(tx.init(params))
    found = go.metrics(jax.vmap(tx.init)({"w": jnp.ones((3, 8, 4, 7))}))
    for name, value in single.items():
        np.testing.assert_array_equal(found[name], [value] * 3, err_msg=name)
