"""Every tree, dimension number and argument gives a clear error or a right step, never a crash or a NaN.

`pytest -m long -s tests/optimizers/test_fuzz.py` tries many more, and prints how many.
"""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers as Dims

import gum_optax as go

from helpers import OPTIMIZERS

MOST = 2**14  # the number of entries of a leaf
NAMES = ("kernel", "w", "bias", "scale", "embedding", "query", "out", "lm_head", "w1", "0")

shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 64)),
    st.lists(st.integers(1, 64), min_size=2, max_size=5).map(tuple),
    st.sampled_from([(0, 4), (4, 0), (3, 0, 5), (1, 1), (1, 64), (64, 1), (5, 1, 1), (64, 64)]),
).filter(lambda shape: math.prod(shape) <= MOST)
leaves = st.one_of(
    st.none(),
    st.builds(
        jax.ShapeDtypeStruct, shapes, st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16])
    ),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(NAMES), inner, min_size=1, max_size=4),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)
axes = st.one_of(
    st.integers(-6, 6), st.lists(st.integers(-6, 6), max_size=3).map(tuple), st.sampled_from(["0", None])
)
entries = st.one_of(st.none(), st.builds(Dims, axes, axes), st.just(Dims()))


@st.composite
def cases(draw, names):
    tree = draw(trees)
    name = draw(st.sampled_from(names))
    make, arguments = OPTIMIZERS[name]
    drawn = {"rank": st.integers(1, 9), "period": st.integers(1, 3), "full_rank_fraction": st.floats(0, 1)}
    arguments = arguments | {key: draw(values) for key, values in drawn.items() if key in arguments}
    dims = None
    if name != "scion" and draw(st.booleans()):
        dims = jax.tree.map(lambda _: draw(entries), tree)
    return make, arguments | {"weight_dimension_numbers": dims}, tree, draw(st.integers(0, 2**32 - 1))


def values(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def started(tx, params):
    return tx, tx.init(params)


def without_a_crash(make):
    """The result of `make()`, or `None` and the message of its error."""
    try:
        return make(), ""
    except (ValueError, TypeError) as error:
        return None, str(error)


def shapes_of(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def tried(case):
    """Whether the optimizer accepts the tree; checks its steps if so, and its error message if not."""
    make, arguments, tree, seed = case
    params = values(tree, seed)
    made, error = without_a_crash(lambda: started(make(0.1, **arguments), params))
    if made is None:
        # The message is the library's own: it names the leaf and the problem.
        assert "leaf" in error, error
        return False
    tx, state = made
    update = jax.jit(tx.update)
    for step in range(2):
        gradients = values(tree, seed + 1 + step)
        steps, new = update(gradients, state, params)
        assert shapes_of(steps) == shapes_of(params)
        assert shapes_of(new) == shapes_of(state)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((steps, new)))
        state = new
    assert int(go.metrics(state)["skipped_steps"]) == 0
    # AdamW moves leaves that are not matrices by the learning rate, and no leaf stays unchanged.
    for g, u in zip(jax.tree.leaves(gradients), jax.tree.leaves(steps), strict=True):
        assert (
            u.size == 0 or min(u.shape, default=1) == 1 or (np.asarray(g) == 0).all() or np.asarray(u).any()
        )
    return True


def run(names, examples):
    counts = {True: 0, False: 0}

    @hypothesis.settings(max_examples=examples, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(cases(names))
    def all_cases(case):
        counts[tried(case)] += 1

    all_cases()
    print(f"{counts[True]} trees were taken, {counts[False]} refused with a clear error")
    return counts


def test_gum_takes_any_tree_or_says_why_not():
    counts = run(["gum"], 12)
    assert counts[True] >= 3


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_any_tree_or_says_why_not(name):
    counts = run([name], 100)
    assert counts[True] >= 50


arguments = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from(["gum", (), [], {}, optax.sgd, 1j]),
)


ARGUMENTS = ("learning_rate", "rank", "period", "full_rank_fraction", "key", "momentum", "momentum_dtype")
ARGUMENTS += ("find_subspace", "compensation", "orthogonalizer", "consistent_rms", "weight_decay", "others")


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.dictionaries(st.sampled_from(ARGUMENTS), arguments, max_size=3))
def test_any_argument_is_taken_or_refused_by_its_name(given):
    """Construction refuses every wrong argument, before any step."""
    given = {"learning_rate": 0.1} | given
    tx, error = without_a_crash(lambda: go.gum(**given))
    if tx is None:
        assert error.startswith(tuple(given)), error
    else:
        assert jax.eval_shape(tx.init, {"kernel": jnp.ones((4, 6))})
