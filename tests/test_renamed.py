"""A renamed public name keeps working for one version, with a warning that gives the new name."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import gum_optax as go

RENAMED = {
    "trion_rule": "scale_by_trion",
    "dion_rule": "scale_by_dion",
    "cosmos_rule": "scale_by_cosmos",
}


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_the_new_thing_and_says_so(old, new):
    with pytest.warns(DeprecationWarning, match=rf"gum_optax\.{old} is now gum_optax\.{new};") as caught:
        found = getattr(go, old)
    assert found is getattr(go, new)
    assert [warning.filename for warning in caught] == [__file__]
    assert old not in dir(go)


def test_no_alias_is_untested():
    assert go._RENAMED == RENAMED


def test_the_upgrade_note_has_every_renamed_name():
    changes = (Path(__file__).resolve().parent.parent / "CHANGELOG.md").read_text()
    (note,) = re.findall(r"### Upgrade.*?\n### ", changes, re.DOTALL)
    rows = [row for row in note.splitlines() if row.startswith("|")]
    for old, new in [*RENAMED.items(), ("low_rank(carry", "on_refresh="), ("together=", "batched=")]:
        assert any(old in row.split("|")[1] and new in row.split("|")[2] for row in rows), old


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'gum_optax' has no attribute 'adam_rule'"):
        go.adam_rule  # noqa: B018


def test_a_misspelled_name_lets_python_suggest_the_right_one():
    with pytest.raises(AttributeError) as caught:
        go.gumm  # noqa: B018
    # Python looks for the suggestion when it prints the error.
    assert (caught.value.name, caught.value.obj) == ("gumm", go)


def test_together_is_the_old_name_of_batched():
    with pytest.warns(DeprecationWarning, match="orthogonalize's argument together is now batched"):
        old = go.orthogonalize(together=True)
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((4, 6))}
    programs = [
        jax.jit(tx.update).lower(params, tx.init(params)).as_text()
        for tx in (old, go.orthogonalize(batched=True), go.orthogonalize())
    ]
    assert programs[0] == programs[1] != programs[2]


def test_the_old_name_of_an_argument_is_the_new_one_and_says_so():
    params = {"w": jnp.ones((4, 6))}
    with pytest.warns(DeprecationWarning, match="argument carry is now on_refresh") as caught:
        old = go.low_rank(optax.trace(0.9), 2, 1, carry=go.restart)
    assert [warning.filename for warning in caught] == [__file__]
    new = go.low_rank(optax.trace(0.9), 2, 1, on_refresh=go.restart)
    found, expected = (tx.update(params, tx.update(params, tx.init(params))[1]) for tx in (old, new))
    chex.assert_trees_all_equal(found, expected)
    kept = go.low_rank(optax.trace(0.9), 2, 1)
    other = kept.update(params, kept.update(params, kept.init(params))[1])
    assert not jnp.array_equal(other[0]["w"], found[0]["w"])
