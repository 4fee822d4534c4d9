"""A state with other arguments: `check_state` names them, `convert_state` converts it before a period."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gum_optax as go
from gum_optax._lowrank.projectors import projector_storage
from gum_optax._state.containers import named_arrays
from gum_optax._state.eight_bits import widened

from helpers import run, sequence


def low_rank_states(state):
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, go.LowRankState))
    return [x for x in nodes if isinstance(x, go.LowRankState)]


SHAPES = {"stack": (5, 6, 9), "tall": (9, 6), "wide": (6, 9), "bias": (4,)}


def gradients(steps, seed=0):
    rng = np.random.default_rng(seed)
    found = {name: sequence(rng, shape, steps) for name, shape in SHAPES.items() if len(shape) > 1}
    found["bias"] = rng.normal(size=(steps, *SHAPES["bias"])).astype(np.float32)
    return [{name: jnp.asarray(x[step]) for name, x in found.items()} for step in range(steps)]


PARAMS = jax.tree.map(jnp.ones_like, gradients(1)[0])
gum = functools.partial(go.gum, 0.1, rank=2, period=3, full_rank_fraction=0.3)


@pytest.mark.parametrize(
    ("tx", "named"),
    [
        (
            gum(rank=3),
            [".projectors['stack'] has shape (5, 6, 2) in place of (5, 6, 3) (another rank)", "rank"],
        ),
        (
            gum(full_rank_fraction=0.6),
            [".index['6x9'] has shape (2,) in place of (4,) (another full_rank_fraction)"],
        ),
        (gum(period=4), ["period is 3 in place of 4"]),
        (gum(momentum_dtype="bfloat16"), ["is missing", "has dtype float32 in place of bfloat16"]),
        (go.galore_muon(0.1, rank=2, period=3), [".slots", "is no part of this optimizer's"]),
        (optax.adamw(0.1), ["is missing", "is no part of this optimizer's"]),
    ],
)
def test_a_state_of_other_arguments_is_named_with_each_difference(tx, named):
    _, state = run(gum(), gradients(2), PARAMS)
    go.check_state(gum(), state, PARAMS)
    with pytest.raises(ValueError, match="this state is of another optimizer") as error:
        go.check_state(tx, state, PARAMS)
    assert all(part in str(error.value) for part in named), error.value


def test_a_state_of_other_parameters_or_dtypes_is_named():
    _, state = run(gum(), gradients(2), PARAMS)
    more = PARAMS | {"new": jnp.ones((6, 9))}
    with pytest.raises(ValueError, match=re.escape(".projectors['new'] is missing")):
        go.check_state(gum(), state, more)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state)
    with pytest.raises(ValueError, match="has dtype bfloat16 in place of float32"):
        go.check_state(gum(), halves, PARAMS)


def test_a_converted_state_goes_on_as_what_it_was():
    """Equal arguments give equal bits. Before the first step, the result is a state of the new optimizer."""
    data = gradients(6)
    _, state = run(gum(), data[:3], PARAMS)
    same = go.convert_state(gum(), state, PARAMS)
    update = jax.jit(gum().update)
    for g in data[3:]:
        (u, state), (v, same) = update(g, state, PARAMS), update(g, same, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, (u, state), (v, same))


@pytest.mark.parametrize("rank", [1, 4])
def test_momentum_goes_along_when_the_rank_of_galore_muon_changes(rank):
    """The lifted momentum stays unchanged, up to the cut columns."""
    make = functools.partial(go.galore_muon, 0.1, period=3, find_subspace=go.random_subspace)
    _, state = run(make(rank=2), gradients(3), PARAMS)
    new = go.convert_state(make(rank=rank), state, PARAMS)
    go.check_state(make(rank=rank), new, PARAMS)
    (before,), (after,) = low_rank_states(state), low_rank_states(new)
    assert int(after.count) == 3
    np.testing.assert_array_equal(after.key, before.key)
    rows = zip(*(jax.tree.leaves(x) for s in (before, after) for x in (s.projectors, s.low)), strict=True)
    kept = min(rank, 2)
    for p, m, q, k in rows:
        np.testing.assert_allclose(q.mT @ q - np.eye(rank), 0, atol=1e-5)
        np.testing.assert_allclose(q @ k, p[..., :kept] @ m[..., :kept, :], atol=1e-5)


def test_gum_goes_on_with_another_rank_period_and_fraction_as_if_it_had_begun_there():
    """GUM's momenta restart with a period, so the conversion keeps only subspace, counts and key."""
    data = gradients(8)
    other = gum(rank=4, period=2, full_rank_fraction=0.7)
    _, state = run(gum(), data[:6], PARAMS)  # a multiple of both periods
    state = go.convert_state(other, state, PARAMS)
    go.check_state(other, state, PARAMS)
    update = jax.jit(other.update)
    for g in data[6:]:
        steps, state = update(g, state, PARAMS)
    assert int(go.metrics(state)["refresh_count"]) == 3
    assert all(np.isfinite(x).all() and x.any() for x in jax.tree.leaves(steps))


def test_within_a_period_and_for_another_model_a_conversion_is_refused():
    _, state = run(gum(), gradients(4), PARAMS)
    with pytest.raises(ValueError, match="1 of 3 steps of this period are taken: take 2 more"):
        go.convert_state(gum(rank=3), state, PARAMS)
    _, state = run(gum(), gradients(3), PARAMS)
    other = PARAMS | {"stack": jnp.ones((5, 6, 10))}
    with pytest.raises(ValueError, match="no change of rank, period or fraction"):
        go.convert_state(gum(rank=3), state, other)


def test_the_state_of_an_nnx_optimizer_is_checked_and_converted():
    def optimizer(rank):
        tx = go.galore_muon(0.1, rank=rank, period=2)
        return nnx.Optimizer(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)

    model, old = nnx.Linear(6, 8, rngs=nnx.Rngs(0)), optimizer(2)
    for _ in range(2):
        gradients = nnx.grad(lambda model: jnp.square(model(jnp.eye(6))).sum())(model)
        old.update(model, gradients)
    params = nnx.state(model, nnx.Param)
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    pure = jax.tree.map(lambda x: x.get_value(), old.opt_state, is_leaf=is_variable)
    for state in (old.opt_state, pure):
        go.check_state(old.tx, state, params)
        with pytest.raises(ValueError, match="another rank"):
            go.check_state(optimizer(3).tx, state, params)
        converted = go.convert_state(optimizer(3).tx, state, params)
        (low,) = low_rank_states(converted)
        assert int(jnp.asarray(low.count)) == 2
        momentum = np.asarray(jax.tree.leaves(low.low)[0])
        (before,) = low_rank_states(old.opt_state)
        np.testing.assert_array_equal(momentum[..., :2, :], jax.tree.leaves(before.low)[0])
        new = optimizer(3)
        new.opt_state = jax.tree.structure(new.opt_state).unflatten(jax.tree.leaves(converted))
        new.update(model, gradients)
        assert int(go.metrics(new.opt_state)["refresh_count"]) == 2


def test_a_state_of_another_optimizer_is_not_converted():
    params = {"kernel": jnp.ones((6, 8))}
    state = optax.adamw(0.1).init(params)
    with pytest.raises(ValueError, match=r"not of the same kind.*mu\['kernel'\].*start anew with tx\.init"):
        go.convert_state(go.gum(0.1, rank=2), state, params)


@pytest.mark.parametrize("restore", [go.check_state, go.convert_state])
def test_a_missing_state_is_refused(restore):
    with pytest.raises(ValueError, match="state holds no array, got None; pass the optimizer state of the"):
        restore(gum(), None, PARAMS)
    restore(optax.sgd(0.1), optax.sgd(0.1).init(PARAMS), PARAMS)  # whose state has none


def wide_of(state):
    """The float32 numbers of a state, by name."""
    return widened(named_arrays(state))


EIGHT_BITS = {
    "gum": (gum(), gum(momentum_dtype="int8")),
    "sumo": tuple(go.sumo(0.1, 2, 3, momentum_dtype=dtype) for dtype in (None, "int8")),
    "muon": tuple(go.muon(0.1, momentum_dtype=dtype) for dtype in (None, "int8")),
    "adamw": (optax.adamw(0.1), go.adamw_8bit(0.1)),
}


@pytest.mark.parametrize(("exact", "coded"), EIGHT_BITS.values(), ids=EIGHT_BITS)
def test_a_state_becomes_eight_bits_and_float32_again(exact, coded):
    """Every number keeps its value to a code; the largest of a block keeps its value twice."""
    big = {"wide": (6, 9), "stack": (5, 6, 9), "table": (64, 128)}
    params = {name: jnp.ones(shape) for name, shape in big.items()}
    rng = np.random.default_rng(0)
    data = [{name: jnp.float32(rng.normal(size=shape)) for name, shape in big.items()} for _ in range(3)]
    _, state = run(exact, data, params)
    narrow = go.convert_state(coded, state, params)
    go.check_state(coded, narrow, params)
    again = go.convert_state(exact, narrow, params)
    go.check_state(exact, again, params)
    for name, x in named_arrays(state).items():
        spacing = np.abs(np.float32(x)).max() / 7 if x.dtype == jnp.float32 else 0
        assert np.abs(np.float32(named_arrays(again)[name]) - np.float32(x)).max() <= spacing, name
    jax.tree.map(np.testing.assert_array_equal, go.convert_state(coded, narrow, params), narrow)
    with pytest.raises(ValueError, match="of another optimizer"):
        go.check_state(coded, state, params)


def test_eight_bits_take_another_rank():
    """Before a period: the first columns of the projectors, straightened, and the first rows of momenta."""
    old = functools.partial(go.galore_muon, 0.1, period=3, momentum_dtype="int8")
    _, state = run(old(rank=3), gradients(3), PARAMS)
    found = low_rank_states(go.convert_state(old(rank=2), state, PARAMS))[0]
    (before,) = low_rank_states(state)
    p, q = (
        projector_storage("int8").load(x.projectors["wide"], x.projectors_scales["wide"])
        for x in (found, before)
    )
    np.testing.assert_allclose(p, q[:, :2], atol=2e-2)
