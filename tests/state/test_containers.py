"""A state stays the same state in every container from a trainer or a checkpoint."""

import functools
import re

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState

import gum_optax as go

PARAMS = {"stack": jnp.ones((5, 4, 6)), "value": {"kernel": jnp.ones((4, 7))}, "list": {0: jnp.ones(3)}}
gum = functools.partial(go.gum, 0.1, rank=2, period=3, full_rank_fraction=0.3)
TX = optax.chain(optax.clip(10.0), gum())


@functools.cache
def trained():
    """A state within a period, so that every count, draw and momentum differs from the start."""
    noise = jax.random.normal(jax.random.key(1), (5, 4, 6))
    return jax.jit(TX.update)(PARAMS | {"stack": noise}, TX.init(PARAMS), PARAMS)[1]


def model():
    return nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(6, 4, rngs=nnx.Rngs(1)))


@functools.cache
def optimizer():
    found = nnx.Optimizer(model(), TX, wrt=nnx.Param)
    found.update(model(), nnx.state(model(), nnx.Param))
    return found


def by_orbax(tree, path):
    """Save the state, and restore it without a target."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state")


def shapes_in_orbax(tree, path):
    """Orbax's metadata of a checkpoint, without its arrays."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.metadata(path / "state").item_metadata.tree


def positions(tree):
    """Convert NamedTuples and tuples to lists."""
    if isinstance(tree, tuple):
        return list(map(positions, tree))
    return {key: positions(x) for key, x in tree.items()} if isinstance(tree, dict) else tree


def numbered(tree):
    """Convert tuples and NamedTuples to dicts of "0", "1", ..."""
    if isinstance(tree, tuple):
        return {str(i): numbered(x) for i, x in enumerate(tree)}
    return {str(key): numbered(x) for key, x in tree.items()} if isinstance(tree, dict) else tree


def train_state(state):
    made = TrainState.create(apply_fn=None, params=PARAMS, tx=TX)
    return made.replace(opt_state=state, step=7)


PLAIN = {
    "itself": lambda state, path: state,
    "flax_dicts": lambda state, path: flax.serialization.to_state_dict(state),
    "flax_bytes": lambda state, path: flax.serialization.msgpack_restore(flax.serialization.to_bytes(state)),
    "frozen": lambda state, path: freeze(flax.serialization.to_state_dict(state)),
    "flat": lambda state, path: flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(state)),
    "orbax": by_orbax,
    "train_state": lambda state, path: train_state(state),
    "train_state_by_orbax": lambda state, path: by_orbax(
        flax.serialization.to_state_dict(train_state(state)), path
    ),
    "nested_train_state": lambda state, path: {"run": {"state": train_state(state), "seed": 3}},
}
# These fields have no names: only a transformation identifies them.
NAMELESS = {
    "lists": lambda state, path: positions(state),
    "numbered": lambda state, path: numbered(state),
    "lists_by_orbax": lambda state, path: by_orbax(positions(state), path),
}
OF_NNX = {
    "nnx_optimizer": lambda optimizer, path: optimizer,
    "nnx_field": lambda optimizer, path: optimizer.opt_state,
    "nnx_state": lambda optimizer, path: nnx.state(optimizer),
    "nnx_split": lambda optimizer, path: nnx.split(optimizer)[1],
    "nnx_pure": lambda optimizer, path: nnx.to_pure_dict(nnx.state(optimizer)),
    "nnx_flat": lambda optimizer, path: dict(nnx.to_flat_state(nnx.state(optimizer))),
    "nnx_dicts": lambda optimizer, path: flax.serialization.to_state_dict(nnx.state(optimizer)),
    "nnx_by_orbax": lambda optimizer, path: by_orbax(nnx.state(optimizer), path),
    "nnx_pure_by_orbax": lambda optimizer, path: by_orbax(nnx.to_pure_dict(nnx.state(optimizer)), path),
    "maxtext": lambda optimizer, path: nnx.state({"model": model(), "optimizer": optimizer}),
    "maxtext_field": lambda optimizer, path: nnx.state(optimizer)["opt_state"],
}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_known(tx, other, state, params):
    """`check_state` finds a difference in it, and `convert_state` returns it unchanged within a period."""
    go.check_state(tx, state, params)
    with pytest.raises(ValueError, match=r"\(another rank\)"):
        go.check_state(other, state, params)
    return go.convert_state(tx, state, params)


OTHER = optax.chain(optax.clip(10.0), gum(rank=3))


@pytest.mark.parametrize("container", (PLAIN | NAMELESS).values(), ids=PLAIN | NAMELESS)
def test_a_state_is_checked_and_converted_in_every_container(container, tmp_path):
    found = assert_known(TX, OTHER, container(trained(), tmp_path), PARAMS)
    assert_equal(found, trained())


@pytest.mark.parametrize("container", PLAIN.values(), ids=PLAIN)
def test_metrics_are_the_same_from_every_container(container, tmp_path):
    wanted = go.metrics(trained())
    assert len(wanted) == 7  # two of them are the blocks in slots
    assert_equal(go.metrics(container(trained(), tmp_path)), wanted)


@pytest.mark.parametrize("container", OF_NNX.values(), ids=OF_NNX)
def test_an_nnx_optimizer_is_known_in_every_container(container, tmp_path):
    state, params = container(optimizer(), tmp_path), nnx.state(model(), nnx.Param)
    found = assert_known(TX, OTHER, state, params)
    assert jax.tree.structure(found) == jax.tree.structure(TX.init(params))
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, (found, optimizer().opt_state)))
    wanted = go.metrics(optimizer().opt_state)
    assert len(wanted) == 6
    assert_equal(go.metrics(state), wanted)


WRAPPERS = {
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda learning_rate: tx)(0.1),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
    "partition": lambda tx: optax.partition({"a": tx}, lambda p: jax.tree.map(lambda _: "a", p)),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_state_is_known_by_name_and_by_position(wrap, tmp_path):
    tx, other = wrap(gum()), wrap(gum(rank=3))
    state = tx.init(PARAMS)
    for held in (state, flax.serialization.to_state_dict(state), by_orbax(state, tmp_path), numbered(state)):
        assert_equal(assert_known(tx, other, held, PARAMS), state)
    assert_equal(go.metrics(flax.serialization.to_state_dict(state)), go.metrics(state))
    assert "captured_energy" in go.metrics(state)


def test_boxes_of_linen_are_known_and_come_back():
    params = {"kernel": nn.Partitioned(jnp.ones((3, 4, 6)), (None, "embed", "mlp"))}
    state = gum().init(params)
    held = flax.serialization.to_state_dict(state)
    assert_equal(assert_known(gum(), gum(rank=3), held, params), state)
    assert_equal(go.metrics(held), go.metrics(state))


def test_shapes_are_checked_but_for_the_period_and_have_metrics_of_shapes(tmp_path):
    state = trained()
    for held in (jax.eval_shape(lambda: state), shapes_in_orbax(state, tmp_path)):
        go.check_state(TX, held, PARAMS)
        go.check_state(optax.chain(optax.clip(10.0), gum(period=5)), held, PARAMS)
        with pytest.raises(ValueError, match=r"\(another rank\)"):
            go.check_state(OTHER, held, PARAMS)
        assert go.metrics(held) == jax.eval_shape(go.metrics, state)
        with pytest.raises(TypeError, match=r"convert_state needs arrays, but .* is a \w+; restore it first"):
            go.convert_state(TX, held, PARAMS)


def test_another_period_is_found_in_every_container(tmp_path):
    other = optax.chain(optax.clip(10.0), gum(period=5))
    for container in (PLAIN | NAMELESS).values():
        with pytest.raises(ValueError, match="period is 3 in place of 5"):
            go.check_state(other, container(trained(), tmp_path / str(id(container))), PARAMS)


def test_a_state_in_dicts_is_converted_to_other_arguments():
    """`convert_state` cuts, pads and restarts the arrays as for the state itself."""
    state = TX.init(PARAMS)
    for other in (OTHER, optax.chain(optax.clip(10.0), gum(rank=4, full_rank_fraction=0.7))):
        wanted = go.convert_state(other, state, PARAMS)
        for held in (flax.serialization.to_state_dict(state), numbered(state)):
            assert_equal(go.convert_state(other, held, PARAMS), wanted)


def test_of_two_optimizer_states_one_has_to_be_given():
    two = {"generator": train_state(trained()), "critic": train_state(trained())}
    with pytest.raises(ValueError, match=r"several optimizer states, .*generator/opt_state.*; give one"):
        go.check_state(TX, two, PARAMS)
    two["critic"] = optax.adam(0.1).init(PARAMS)
    go.check_state(TX, two, PARAMS)


def test_a_state_wrapped_otherwise_is_of_another_optimizer():
    with pytest.raises(ValueError, match=re.escape("[1].skipped is no part of this optimizer's")):
        go.check_state(gum(), trained(), PARAMS)
    assert go.metrics({"params": PARAMS | {"skipped": jnp.ones(3)}, "step": 3}) == {}
