"""`update` names mismatched state, gradients and parameters, without cost if they match."""

import functools
import re

import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest

import gum_optax as go

from helpers import CORE_AND_LONG, OPTIMIZERS

PARAMS = {"stack": jnp.ones((5, 4, 6)), "kernel": jnp.ones((4, 7)), "bias": jnp.ones(3)}


@functools.cache
def optimizer(name):
    make, arguments = OPTIMIZERS[name]
    return make(0.1, **arguments)


@functools.cache
def initial(name):
    return optimizer(name).init(PARAMS)


def structure(name):
    return jax.tree.structure(initial(name)), jax.tree.map(jnp.shape, initial(name))


def updated(tx, gradients, state, params=PARAMS):
    return jax.eval_shape(tx.update, gradients, state, params)


@pytest.mark.parametrize("name", CORE_AND_LONG)
def test_the_state_of_every_other_optimizer_is_refused(name):
    tx, others = optimizer(name), {other: initial(other) for other in OPTIMIZERS}
    alike = {other for other in OPTIMIZERS if structure(other) == structure(name)}
    for other in others.keys() - alike:
        with pytest.raises(
            ValueError, match=r"this state is not one of this optimizer for these gradients: "
        ):
            updated(tx, PARAMS, others[other])
    others = {"adamw": optax.adamw(0.1), "optax": optax.contrib.muon(0.1), "chain": optax.chain(tx)}
    for other in others.values():
        with pytest.raises(
            ValueError, match=r"state must be what this optimizer's init makes, a SkipNonFinite"
        ):
            updated(tx, PARAMS, other.init(PARAMS))


def test_what_is_alike_are_the_states_of_one_kind():
    """These optimizers have equal states: Adam in a subspace, and stateless rules."""
    kinds = {}
    for name in OPTIMIZERS:
        kinds.setdefault(str(structure(name)), []).append(name)
    assert sorted(kinds.values()) == sorted(
        [
            ["muon"],
            ["normuon"],
            ["galore_muon"],
            ["gum"],
            ["galore", "golore", "frugal"],
            ["fira"],
            ["sumo"],
            ["swan", "sinkgd"],
            ["trion"],
            ["dion"],
            ["cosmos"],
            ["scion"],
            ["adalomo"],
            ["hfac"],
        ]
    )


def test_the_message_names_what_differs_and_the_way_out():
    wrong = optimizer("muon").init(PARAMS)
    with pytest.raises(
        ValueError, match=r"\.captured is missing; .*; and \d+ more\. Make it by tx\.init\(params\)"
    ):
        updated(optimizer("gum"), PARAMS, wrong)
    with pytest.raises(ValueError, match="a SkipNonFiniteState, got a tuple"):
        updated(optimizer("gum"), PARAMS, optax.adamw(0.1).init(PARAMS))


@pytest.mark.parametrize("name", ["gum", "muon", "dion"])
def test_gradients_of_another_structure_are_named(name):
    tx, state = optimizer(name), initial(name)
    more, less = PARAMS | {"new": jnp.ones((4, 7))}, {k: x for k, x in PARAMS.items() if k != "kernel"}
    for gradients, params in ((more, PARAMS), (less, PARAMS), (PARAMS, more)):
        leaf = "kernel" if gradients is less else "new"
        tree = "params" if params is more or gradients is less else "updates"
        with pytest.raises(
            ValueError, match=f"trees of the same leaves, but only {tree} has {leaf}; the order"
        ):
            updated(tx, gradients, state, params)
    for params in (None, more):
        with pytest.raises(ValueError, match=r"\['new'\] is missing"):
            updated(tx, more, state, params)
    for params in (None, less):
        with pytest.raises(ValueError, match=r"\['kernel'\] is no part of this optimizer's"):
            updated(tx, less, state, params)
    wide = PARAMS | {"kernel": jnp.ones((4, 9))}
    with pytest.raises(ValueError, match=re.escape("has shape")):
        updated(tx, wide, state, wide)


def test_gradients_of_another_shape_are_named():
    """A transposed one has the same matrix view, and would make a step without an error."""
    tx, state = optimizer("gum"), initial("gum")
    for change in ({"kernel": PARAMS["kernel"].T}, {"bias": jnp.ones(5)}):
        ((name, x),) = change.items()
        shapes = re.escape(f"{name} has shape {x.shape} in place of {PARAMS[name].shape}")
        with pytest.raises(
            ValueError, match=f"updates must have the shapes of params, but {shapes}; pass update"
        ):
            updated(tx, PARAMS | change, state, PARAMS)


def test_a_state_in_dicts_names_convert_state():
    held = flax.serialization.to_state_dict(initial("gum"))
    with pytest.raises(ValueError, match=r"got a dict; if that holds its arrays.*convert_state"):
        updated(optimizer("gum"), PARAMS, held)
    back = go.convert_state(optimizer("gum"), held, PARAMS)
    assert updated(optimizer("gum"), PARAMS, back)


def test_other_errors_come_through():
    def finder(key, gradient, previous):
        raise ZeroDivisionError("of the finder")

    tx = go.galore_muon(0.1, rank=2, find_subspace=finder)
    with pytest.raises(ZeroDivisionError, match="of the finder"):
        updated(tx, PARAMS, tx.init(PARAMS))


def test_nothing_is_traced_for_what_goes_together():
    inits = []
    adam = optax.adam(0.1)
    others = adam._replace(init=lambda params: inits.append(1) or adam.init(params))
    tx = go.gum(0.1, rank=2, others=others)
    state = tx.init(PARAMS)
    inits.clear()
    updated(tx, PARAMS, state)
    assert not inits
