"""Momentum in eight bits: its size, its error, what a refresh and a rejected step make of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gum_optax as go
from gum_optax._core.acceptance import Acceptance
from gum_optax._core.context import MatrixContext
from gum_optax._core.trees import key_name
from gum_optax._linalg.quantize import BLOCK, dequantize
from gum_optax._lowrank.projectors import projector_storage
from gum_optax._transforms.momentum import trace
from gum_optax._transforms.storage import QuantizedTrace

from helpers import run, sequence

INT8 = {"rank": 2, "period": 3, "momentum_dtype": "int8"}
MAKERS = {
    "muon": functools.partial(go.muon, 0.1),
    "galore_muon": functools.partial(go.galore_muon, 0.1, 2, 3),
    "gum": functools.partial(go.gum, 0.1, 2, 3, 0.5),
    "sumo": functools.partial(go.sumo, 0.1, 2, 3),
}


def quantized(state):
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QuantizedTrace))
    return [x for x in nodes if isinstance(x, QuantizedTrace)]


def momenta(state):
    """The float32 momenta of a state, in the order of its leaves."""

    def wide(node):
        if isinstance(node, QuantizedTrace):
            return node._replace(trace=jax.tree.map(dequantize, node.trace, node.trace_scales))
        return node

    state = jax.tree.map(wide, state, is_leaf=lambda x: isinstance(x, QuantizedTrace))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [x for path, x in leaves if "trace" in map(key_name, path)]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_momentum_and_slots_are_codes_and_close_to_the_float32_ones(make):
    """Four steps cross a refresh, at which SUMO rotates its momentum."""
    leaves = [sequence(np.random.default_rng(i), (5, 8), 4) for i in range(4)]
    gradients = [{str(i): leaf[step] for i, leaf in enumerate(leaves)} for step in range(4)]
    (_, wide), (_, narrow) = (run(make(momentum_dtype=dtype), gradients) for dtype in (None, "int8"))
    pairs = list(zip(momenta(wide), momenta(narrow), strict=True))
    assert pairs
    for m, low in pairs:
        # One rounding is at most a 127th of the largest entry, and the average holds a few of them.
        assert np.abs(m - low).max() < 4 / 127 * np.abs(m).max()
    for node in quantized(narrow):
        assert all(x.dtype == jnp.int8 for x in jax.tree.leaves(node.trace))


def test_the_step_reads_the_momentum_that_is_stored(rng):
    rule = trace(0.9, nesterov=True, dtype="int8")
    gradients = [{"w": jnp.float32(rng.normal(size=(3, 4, 6)))} for _ in range(3)]
    steps, state = run(rule, gradients)
    stored = dequantize(state.trace["w"], state.trace_scales["w"])
    np.testing.assert_allclose(steps[-1]["w"], 0.9 * stored + gradients[-1]["w"], rtol=1e-5, atol=1e-6)


def test_a_saved_state_goes_on_to_the_bit(tmp_path):
    gradients = [{"w": g} for g in sequence(np.random.default_rng(5), (4, 5, 8), 6)]
    tx = go.gum(0.1, **INT8)
    whole, expected = run(tx, gradients)
    _, half = run(tx, gradients[:4])
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "state", half)
    checkpointer.wait_until_finished()
    state = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, gradients[0]))
    for g, step in zip(gradients[4:], whole[4:], strict=True):
        updates, state = jax.jit(tx.update)(g, state)
        np.testing.assert_array_equal(updates["w"], step["w"])
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_quarter_of_the_momentum_and_slots():
    params = {str(i): {"kernel": jax.ShapeDtypeStruct((64, 2 * BLOCK), jnp.float32)} for i in range(4)}
    wide, narrow = (
        go.memory_report(go.gum(0.1, 8, 3, 0.25, momentum_dtype=dtype), params).state
        for dtype in (None, "int8")
    )
    of_rows, of_slot = 4 * 8 * 2 * BLOCK, 64 * 2 * BLOCK
    assert wide["trace"] == 4 * of_rows
    assert narrow["trace"] == of_rows
    assert narrow["trace_scales"] == 4 * of_rows // BLOCK
    assert narrow["slots"] - wide["slots"] == of_slot * (1 + 4 / BLOCK) - 4 * of_slot + 4  # and a count


def test_a_steady_gradient_smaller_than_a_code_is_not_lost():
    """Beside an entry of 1, steps of 1e-3 stay below half a code for good; on average they arrive."""
    g = jnp.full((64, BLOCK), 1e-3).at[:, 0].set(1.0)
    rule = trace(0.9, dtype="int8")

    def step(state, _):
        return rule.update(g, state)[1], None

    state, _ = jax.lax.scan(step, rule.init(g), length=60)
    momentum = np.asarray(dequantize(state.trace, state.trace_scales))[:, 1:]
    assert abs(momentum.mean() - 1e-2) < 4 * momentum.std() / np.sqrt(momentum.size)


def test_a_rejected_step_keeps_codes_and_scales(rng):
    rule = trace(0.9, dtype="int8")
    first, second = ({name: jnp.float32(rng.normal(size=(3, 5))) for name in "ab"} for _ in range(2))
    _, state = rule.update(first, rule.init(first))
    accept = Acceptance(jnp.asarray(False), {0: jnp.asarray(True), 1: jnp.asarray(False)})
    _, new = rule.update(second, state, context=MatrixContext(accept=accept))
    for kept in ("trace", "trace_scales"):
        np.testing.assert_array_equal(getattr(new, kept)["b"], getattr(state, kept)["b"])
        assert (getattr(new, kept)["a"] != getattr(state, kept)["a"]).any()


def test_a_rotation_turns_the_momentum_at_a_refresh_alone(rng):
    rule = trace(0.9, dtype="int8")
    g = {"w": jnp.float32(rng.normal(size=(3, 2, 7)))}
    _, state = rule.update(g, rule.init(g))
    turn = {"w": jnp.float32(np.linalg.qr(rng.normal(size=(3, 2, 2)))[0])}
    stay, moved = (go.rotate(rule, state, g, turn, jnp.asarray(yes)) for yes in (False, True))
    jax.tree.map(np.testing.assert_array_equal, stay, state)
    expected = turn["w"] @ dequantize(state.trace["w"], state.trace_scales["w"])
    found = dequantize(moved.trace["w"], moved.trace_scales["w"])
    assert np.abs(found - expected).max() <= 0.51 * np.asarray(moved.trace_scales["w"]).max()


def low_rank_state(state):
    (node,) = (
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, go.LowRankState))
        if isinstance(x, go.LowRankState)
    )
    return node


@pytest.mark.parametrize("make", [go.gum, go.galore_muon, go.sumo])
def test_projectors_are_codes_that_change_at_refreshes_alone(make):
    gradients = [{"w": g} for g in sequence(np.random.default_rng(3), (4, 5, 8), 6)]
    tx = make(0.1, **INT8)
    state, seen = tx.init(gradients[0]), []
    update = jax.jit(tx.update)
    for g in gradients:
        _, state = update(g, state)
        node = low_rank_state(state)
        seen.append((np.asarray(node.projectors["w"]), np.asarray(node.projectors_scales["w"])))
    assert {x.dtype for x, _ in seen} == {np.dtype(np.int8)}
    for step in (1, 2, 4, 5):
        jax.tree.map(np.testing.assert_array_equal, seen[step], seen[step - 1])
    assert (seen[3][0] != seen[2][0]).any()
    p = projector_storage("int8").load(*map(jnp.asarray, seen[-1]))
    np.testing.assert_allclose(p.mT @ p, np.broadcast_to(np.eye(2), (4, 2, 2)), atol=1e-6)


def test_the_estimate_is_unbiased_on_projectors_of_eight_bits(rng):
    """One block at full rank of two: the mean over both draws of a linear step is the gradient."""
    g = {"w": jnp.float32(rng.normal(size=(2, 6, 8)))}
    rule = go.unbiased_low_rank(optax.identity(), 2, 3, 0.5, projector_dtype="int8")
    start = rule.init(g)
    update = jax.jit(rule.update)
    _, state = update(g, start)  # the second step has no refresh: its projectors come from codes
    total, drawn = 0.0, set()
    for key in range(40):
        keyed = state._replace(key=jax.random.key_data(jax.random.key(key)))
        steps, new = update(g, keyed)
        index = int(new.outside.index["6x8"][0])
        if index not in drawn:
            drawn.add(index)
            total = total + steps["w"]
    assert drawn == {0, 1}
    np.testing.assert_allclose(total / 2, g["w"], atol=1e-5)


def test_a_leaf_that_rejects_a_refresh_keeps_its_projector(rng):
    gradients = [{name: jnp.float32(rng.normal(size=(5, 8))) for name in "xy"} for _ in range(4)]
    tx = go.galore_muon(0.1, **INT8)
    state, update = tx.init(gradients[0]), jax.jit(tx.update)
    for g in gradients[:3]:
        _, state = update(g, state)
    _, new = update(gradients[3] | {"x": gradients[3]["x"].at[0, 0].set(jnp.nan)}, state)
    before, after = low_rank_state(state), low_rank_state(new)
    for field in ("projectors", "projectors_scales"):
        np.testing.assert_array_equal(getattr(after, field)["x"], getattr(before, field)["x"])
        assert (getattr(after, field)["y"] != getattr(before, field)["y"]).any()


def test_at_most_27_hundredths_of_the_state():
    params = {f"{i}": {"kernel": jax.ShapeDtypeStruct((256, 512), jnp.float32)} for i in range(8)}
    for make, arguments in ((go.gum, {"full_rank_fraction": 0.25}), (go.galore_muon, {}), (go.sumo, {})):
        wide, narrow = (
            sum(go.memory_report(make(0.1, 32, 3, momentum_dtype=dtype, **arguments), params).state.values())
            for dtype in (None, "int8")
        )
        assert narrow <= 0.27 * wide


def test_other_dtypes_of_projectors_are_refused():
    with pytest.raises(ValueError, match="projector_dtype must be float32 or int8, got 'bfloat16'"):
        go.low_rank(optax.identity(), 2, 3, projector_dtype="bfloat16")
