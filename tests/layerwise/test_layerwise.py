"""A step that takes one layer after the other is the step of the whole gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layerwise_model import (
    LAYERS,
    WIDE,
    WIDTH,
    batch,
    embed,
    gap,
    head,
    layer,
    layer_by_layer,
    loss,
    ordinary,
    params,
    run,
    small_gum,
)

import gum_optax as go
from gum_optax._core.keys import RowKey, normal
from gum_optax._transforms import adam_8bit
from gum_optax._transforms.storage import noise_of

from helpers import CORE, LOW_RANK, OPTIMIZERS, gum_by_neuron

STEPS = 9  # three periods of three


def both(tx, start=None, steps=STEPS, model=None, **options):
    """The ordinary run and the run layer by layer."""
    start = params() if start is None else start
    data = [batch(step) for step in range(steps)]
    of_model = {} if model is None else {"layer": model}
    whole = functools.partial(loss, **of_model)
    return (
        run(ordinary(tx, whole), tx, start, data),
        run(layer_by_layer(tx, **of_model, **options), tx, start, data),
    )


def check_equal(tx, start=None, steps=STEPS, **options):
    """Parameters to 1e-5, the same losses, counts, draws and metrics."""
    (expected, state, losses), (found, other, values) = both(tx, start, steps, **options)
    assert gap(found, expected) < 1e-5
    np.testing.assert_allclose(values, losses, rtol=1e-5)
    assert jax.tree.structure(other) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(a.dtype, jnp.integer):
            np.testing.assert_array_equal(a, b)  # counts, keys and draws
    measured, metrics = go.metrics(other), go.metrics(state)
    assert measured.keys() == metrics.keys()
    for name, value in metrics.items():
        # The residual's share is the root of a small difference.
        np.testing.assert_allclose(measured[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    return state


def optimizer(name):
    make, keywords = OPTIMIZERS[name]
    # Scion's and FRUGAL's steps are signs: at a large rate a rounding decides which way a small run goes.
    return make(2**-12 if name in ("scion", "frugal") else 1e-2, weight_decay=0.1, **keywords)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in CORE)) for name in OPTIMIZERS]
)
def test_every_optimizer_steps_as_for_the_whole_gradient(name):
    state = check_equal(optimizer(name))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("make", [optax.sgd, optax.adamw, optax.lion])
def test_optaxs_rules_for_each_number_step_so_too(make):
    schedule = optax.linear_schedule(1e-2, 1e-3, STEPS)
    check_equal(make(schedule))


def test_neurons_and_cautious_decay_step_so_too():
    check_equal(gum_by_neuron(1e-2))


def test_a_second_moment_starts_so_too():
    inner = go.with_second_moment(optax.scale_by_adam(eps=1e-3))
    rule = go.low_rank(inner, **LOW_RANK, on_refresh=go.restart)
    check_equal(go.matrix_optimizer(rule, 1e-2, 1.0))


def test_protected_and_normalized_weights_step_so_too():
    check_equal(go.protect(small_gum(weight_decay=0.1)))
    rule = go.weight_normalized(optax.adam(1e-2, eps=1e-3), optax.adam(1e-2, eps=1e-3))
    down, others = optax.chain(rule, optax.scale(-1.0)), optax.adamw(1e-2)
    check_equal(go.matrix_optimizer(down, 1.0, 1.0, wide=False, others=others))


def test_random_subspaces_are_those_that_the_stack_would_draw():
    check_equal(go.golore(1e-2, **LOW_RANK, random_after=0), steps=7)
    check_equal(go.galore_muon(1e-2, **LOW_RANK, find_subspace=go.sketched_subspace), steps=4)


def test_a_row_draws_the_numbers_of_its_stack():
    key = jax.random.key(3)
    for row in range(5):
        one = RowKey(key, jnp.int32(row), 5)
        np.testing.assert_array_equal(noise_of(one, (1, 4, 3))[0], noise_of(key, (5, 4, 3))[row])
        np.testing.assert_array_equal(normal(one, (1, 4, 3))[0], jax.random.normal(key, (5, 4, 3))[row])
        assert jax.random.key_data(one.own()).tolist() != jax.random.key_data(key).tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("make", [small_gum, functools.partial(go.muon, 1e-2)])
def test_momenta_in_few_bits_round_as_in_the_stack(make, dtype):
    """One step: in a longer run a rounding of float32 may decide a rounding to few bits."""
    tx = make(momentum_dtype=dtype)
    (expected, state, _), (found, other, _) = both(tx, steps=1)
    # In int8 the step reads the rounded momentum, and a rounding of float32 may decide a code.
    assert gap(found, expected) < (1e-5 if dtype == "bfloat16" else 1e-4)
    rounded = [x for x in jax.tree.leaves(state) if x.dtype == dtype]
    again = [x for x in jax.tree.leaves(other) if x.dtype == dtype]
    differ = sum(int(jnp.sum(a != b)) for a, b in zip(again, rounded, strict=True))
    count = sum(x.size for x in rounded)
    assert count > 300
    assert differ < count / 100


@pytest.mark.parametrize("smallest", [1, LAYERS * WIDTH])
def test_adams_moments_of_eight_bits_round_as_in_the_stack(monkeypatch, smallest):
    """The second size is that of the stack of norms: a single norm would be too small for eight bits."""
    monkeypatch.setattr(adam_8bit, "_SMALLEST", smallest)
    monkeypatch.setattr(adam_8bit, "_SHORTEST_ROW", 1)
    tx = small_gum(others=go.adamw_8bit(1e-2, b2=0.99))
    (expected, state, _), (found, other, _) = both(tx, steps=1)
    assert gap(found, expected) < 1e-5
    codes = [x for x in jax.tree.leaves(state) if x.dtype.itemsize == 1]
    again = [x for x in jax.tree.leaves(other) if x.dtype.itemsize == 1]
    assert len(codes) > 4
    for a, b in zip(again, codes, strict=True):
        assert np.mean(np.float32(a) != np.float32(b)) < 0.02


def test_layers_may_be_separate_trees():
    check_equal(small_gum(weight_decay=0.1), params(stacked=False, count=2), steps=7)


@pytest.mark.long
@pytest.mark.parametrize("name", ["adamw", "golore", "scion", "cosmos"])
def test_other_optimizers_take_separate_trees_too(name):
    tx = optax.adamw(1e-2) if name == "adamw" else optimizer(name)
    check_equal(tx, params(stacked=False, count=2), steps=7)


@pytest.mark.parametrize(("stacked", "count", "keep_every"), [(True, LAYERS, 2), (False, 2, 2)])
def test_inputs_that_are_not_kept_are_computed_again(stacked, count, keep_every):
    tx, data = small_gum(weight_decay=0.1), [batch(i) for i in range(4)]
    start = params(stacked=stacked, count=count)
    expected, state, losses = run(layer_by_layer(tx), tx, start, data)
    found, other, values = run(layer_by_layer(tx, keep_every=keep_every), tx, start, data)
    assert gap(found, expected) < 1e-6
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), other, state)
    np.testing.assert_allclose(values, losses, rtol=1e-6)


@pytest.mark.parametrize(("stacked", "keep_every"), [(True, 1), (False, 2)])
def test_microbatches_give_the_step_of_their_mean_gradient(stacked, keep_every):
    """Three microbatches of one window are a batch of three windows, over two periods with a refresh each."""
    tx, start = small_gum(weight_decay=0.1), params(stacked=stacked)
    data = [batch(i) for i in range(5)]
    in_three = [jax.tree.map(lambda x: x[:, None], each) for each in data]
    expected, state, losses = run(ordinary(tx), tx, start, data)
    step = layer_by_layer(tx, microbatches=3, keep_every=keep_every)
    found, other, values = run(step, tx, start, in_three)
    assert gap(found, expected) < 1e-5
    np.testing.assert_allclose(values, losses, rtol=1e-5)
    assert go.metrics(other).keys() == go.metrics(state).keys()


def test_sums_over_microbatches_are_float32():
    """Of 512 equal microbatches: in bfloat16 the sum would stop at 256 of them."""
    count, tx, start = 512, optax.sgd(1.0), params(dtype=jnp.bfloat16)
    one = jax.tree.map(lambda x: x[:1], batch(0))
    many = jax.tree.map(lambda x: jnp.repeat(x[None], count, 0), one)
    expected, _, _ = run(layer_by_layer(tx), tx, start, [one])
    found, _, _ = run(layer_by_layer(tx, microbatches=count), tx, start, [many])
    assert gap(found["layers"]["norm"], expected["layers"]["norm"]) < 2**-7
    assert gap(expected["layers"]["norm"], start["layers"]["norm"]) > 2**-5


def test_a_microbatch_that_is_not_finite_skips_the_step():
    tx = small_gum()
    data = jax.tree.map(lambda x: x[:, None], (*batch(0), jnp.ones(3).at[1].set(jnp.nan)))
    step = layer_by_layer(tx, head=lambda own, x, data: head(own, x, data) * data[2][0], microbatches=3)
    found, state, _ = run(step, tx, params(), [data])
    assert int(state.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, found, params())


def test_blocks_of_several_shapes_parts_of_kernels_and_experts():
    """A fused kernel of two parts, three experts in each layer, and a sampled matrix in the head."""
    start = params(shapes={"fused": (WIDTH, 2 * WIDTH), "experts": (3, WIDTH, WIDTH)})
    start["head"]["proj"] = {"kernel": start["layers"]["q"]["kernel"][0] / 2}

    def model(own, x):
        a, b = jnp.split(x @ own["fused"]["kernel"], 2, axis=-1)
        mixed = jnp.einsum("btd,edf->btf", a, own["experts"]["kernel"])
        return layer(own, x) + jnp.sin(b) * jnp.tanh(mixed)

    numbers = {
        "*/fused/kernel": go.Parts((WIDTH, WIDTH)),
        "*/experts/kernel": go.LAST_TWO,
        "head/proj/*": go.LAST_TWO,
    }
    tx = small_gum(weight_dimension_numbers=numbers)
    state = check_equal(tx, start, steps=7, model=model)
    # q, k, both parts and the experts of every layer, and the matrix of the head
    assert go.metrics(state).keys() >= {
        f"sampled/6x6/{slot}" for slot in range(round(0.3 * (7 * LAYERS + 1)))
    }


def test_masks_labels_and_other_rules_see_the_whole_tree():
    def mask(tree):
        return jax.tree.map(lambda x: x.ndim > 2, tree)

    def labels(tree):
        first = jax.tree.map(lambda x: "few" if x.shape[-2:] == (2, WIDTH) else "gum", tree["layers"])
        return {"embed": "gum", "layers": first, "head": "gum"}

    tx = small_gum(weight_decay=0.3, weight_decay_mask=mask, others=optax.lion(1e-3))
    check_equal(optax.partition({"gum": tx, "few": optax.set_to_zero()}, labels), steps=4)


@pytest.mark.parametrize("name", ["scion", "adalomo"])
def test_leaves_beside_the_matrices_are_read_as_in_the_whole_tree(name):
    """A vector for each layer, without a vector's name, and an excluded matrix."""
    make, rate = getattr(go, name), 2**-12 if name == "scion" else 1e-2
    start = params()
    start["layers"]["mix"] = jnp.ones((LAYERS, WIDTH))

    def model(own, x):
        return layer(own, x) * own["mix"]

    check_equal(make(rate, weight_dimension_numbers={"layers/q/*": None}), start, steps=2, model=model)


@pytest.mark.parametrize("name", ["scion", "adalomo"])
def test_a_number_for_each_layer_is_refused_where_vectors_have_a_norm(name):
    """In the stack the numbers of all layers are one vector; layer by layer each would be a vector of one."""
    start = params()
    start["layers"]["gain"] = jnp.ones(LAYERS)
    tx = getattr(go, name)(1e-2)
    message = re.compile(r"layers/gain has one number for each layer\..*others=optax\.adamw")
    refused(tx, message, start, state=jax.eval_shape(tx.init, start), per_layer=name == "adalomo")


def test_parameters_in_bfloat16():
    start = params(dtype=jnp.bfloat16)
    (expected, _, _), (found, _, _) = both(small_gum(), start, steps=1)
    rows = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in rows:
        assert a.dtype == jnp.bfloat16
        # a rounding of the parameter
        np.testing.assert_allclose(jnp.float32(a), jnp.float32(b), rtol=2**-7, atol=2**-9)


def test_a_loss_that_is_not_finite_changes_the_count_of_skipped_steps_alone():
    tx = small_gum(weight_decay=0.1)
    step = layer_by_layer(tx, head=lambda own, x, data: head(own, x, data) * data[2])
    data = [(*batch(i), jnp.float32(1)) for i in range(5)]
    spoilt = [(*batch(i), jnp.float32(jnp.nan if i in (0, 3, 6) else 1)) for i in range(8)]
    kept = [x for x in spoilt if jnp.isfinite(x[2])]
    expected, state, _ = run(step, tx, params(), kept)
    found, other, losses = run(step, tx, params(), spoilt)
    assert len(data) == len(kept) == 5
    assert [i for i, x in enumerate(losses) if not np.isfinite(x)] == [0, 3, 6]
    assert int(other.skipped) == 3
    jax.tree.map(np.testing.assert_array_equal, (found, other.inner), (expected, state.inner))


def test_a_plain_rule_of_optax_skips_a_loss_that_is_not_finite_too():
    tx = optax.adam(1e-2)
    step = layer_by_layer(tx, head=lambda own, x, data: head(own, x, data) * jnp.inf)
    found, state, _ = run(step, tx, params(), [batch(0)])
    jax.tree.map(np.testing.assert_array_equal, (found, state), (params(), tx.init(params())))


@jax.custom_vjp
def spoilt_if(x, is_spoilt):
    """`x`, whose gradient is NaN if `is_spoilt`."""
    del is_spoilt
    return x


spoilt_if.defvjp(
    lambda x, is_spoilt: (x, is_spoilt), lambda yes, dx: (jnp.where(yes, jnp.nan, dx), jnp.zeros_like(yes))
)


@pytest.mark.parametrize("where", ["head", "layers", "embed"])
@pytest.mark.parametrize("others", [None, optax.adamw(1e-2)], ids=["default", "of optax"])
def test_what_leaves_share_stays_if_any_gradient_is_not_finite(others, where):
    """The count of Adam's steps is of the head, the norms and the embedding together."""
    tx, start = go.gum(1e-2, rank=2, others=others), params(count=2)

    def spoilt(kind, f):
        def spoiling(own, *rest):
            return f(jax.tree.map(lambda x: spoilt_if(x, jnp.float32(kind == where)), own), *rest)

        return spoiling

    def counts(state):
        rows = jax.tree_util.tree_leaves_with_path(state)
        return [int(x) for path, x in rows if jax.tree_util.keystr(path).endswith(".count")]

    parts = (spoilt("embed", embed), spoilt("layers", layer), spoilt("head", head))
    step = jax.jit(lambda p, s: go.layerwise_update(tx, *parts, batch(0), s, p))
    loss, _, state = step(start, tx.init(start))
    assert np.isfinite(loss)
    assert int(state.skipped) == 1
    assert set(counts(state)) == {0}


@pytest.mark.parametrize("stacked", [True, False])
def test_a_gradient_that_is_not_finite_leaves_its_layer_as_it_was(stacked):
    """The first layer's matrix gets a gradient of NaN behind a finite loss; the others step as they would."""
    count = LAYERS if stacked else 2
    tx = small_gum()
    start = params(stacked=stacked, count=count)
    if stacked:
        start["layers"]["flag"] = jnp.zeros(count).at[0].set(1)
    else:
        start["layers"] = [own | {"flag": jnp.float32(i == 0)} for i, own in enumerate(start["layers"])]

    def spoilt(own, x):
        q = spoilt_if(own["q"]["kernel"], jax.lax.stop_gradient(own["flag"]) > 0.5)
        return layer(own | {"q": {"kernel": q}}, x)

    def sound(own, x):
        return layer(own, x) + 0 * jnp.sum(own["flag"])

    expected, state, _ = run(layer_by_layer(tx, layer=sound), tx, start, [batch(0)])
    found, other, losses = run(layer_by_layer(tx, layer=spoilt), tx, start, [batch(0)])
    assert np.isfinite(losses).all()
    assert int(other.skipped) == 1
    assert int(state.skipped) == 0

    def row(tree, i):
        return jax.tree.map(lambda x: x[i], tree["layers"]) if stacked else tree["layers"][i]

    jax.tree.map(np.testing.assert_array_equal, row(found, 0), row(start, 0))
    for i in range(1, count):
        jax.tree.map(np.testing.assert_array_equal, row(found, i), row(expected, i))
    assert gap(row(expected, 0)["up"], row(start, 0)["up"]) > 1e-4
    jax.tree.map(np.testing.assert_array_equal, found["embed"], expected["embed"])
    # What all layers share stays, as after any step that a leaf skips.
    rule = other.inner.inner_states["matrices"].inner_state[0]
    assert int(rule.count) == int(rule.refreshes) == 0


def refused(tx, message, start=None, error=ValueError, functions=(embed, layer, head), state=None, **options):
    """`message` is a part of the error, or a pattern; `start` may be wrong, so the state is of others."""
    start = params() if start is None else start
    if state is None:
        state = jax.eval_shape(tx.init, params(stacked=not isinstance(start.get("layers"), list)))
    match = message if isinstance(message, re.Pattern) else re.escape(message)
    with pytest.raises(error, match=match):  # traced only, not run
        jax.eval_shape(
            lambda state, start: go.layerwise_update(tx, *functions, batch(0), state, start, **options),
            state,
            start,
        )


CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), small_gum())


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (CLIPPED, "embed/embedding depends on the gradient of head and layers"),
        (optax.apply_if_finite(optax.sgd(0.1), 3), "per_layer=True"),
        (
            optax.MultiSteps(small_gum(), 2).gradient_transformation(),
            "projected_update averages microbatches",
        ),
        (optax.lamb(0.1), "depends on the gradient of all layers at once"),
        (small_gum(others=optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))), "embed/embedding"),
    ],
    ids=["clipped", "apply_if_finite", "MultiSteps", "lamb", "clipped others"],
)
def test_what_needs_several_gradients_at_once_is_refused(tx, message):
    refused(tx, message)


def test_a_rule_without_the_turn_of_its_layer_is_refused_always():
    tx = optax.MultiSteps(go.sinkgd(0.1), 2).gradient_transformation()
    refused(tx, "without the extra arguments of its update", per_layer=True)


def test_a_norm_may_be_one_of_each_layer():
    """The clipped step of one layer depends on its own gradient: SGD steps have norm one at most."""
    tx = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    start = params()
    found, _, _ = run(layer_by_layer(tx, per_layer=True), tx, start, [batch(0)])
    steps = jax.tree.map(jnp.subtract, found, start)
    norms = [optax.global_norm(jax.tree.map(lambda x, i=i: x[i], steps["layers"])) for i in range(LAYERS)]
    np.testing.assert_allclose([*norms, optax.global_norm(steps["head"])], 0.01, rtol=1e-4)


def test_arguments_that_do_not_fit_are_refused():
    tx = optax.sgd(0.1)
    refused(tx, "must have the entries 'embed', 'layers' and 'head'", {"embed": jnp.ones(3)})
    unequal = params(stacked=False)
    unequal["layers"][1]["q"]["kernel"] = jnp.ones((2, 2))
    refused(tx, "a sequence of equal trees", unequal)
    ragged = params()
    ragged["layers"]["q"]["kernel"] = jnp.ones((LAYERS + 1, WIDTH, WIDTH))
    refused(tx, "whose first axis counts the layers", ragged)
    refused(tx, "layer", error=TypeError, functions=(embed, None, head))
    refused(tx, f"keep_every must divide the {LAYERS} layers, got 3", keep_every=3)
    refused(tx, "keep_every must be at least 1", keep_every=0)
    refused(tx, "with microbatches=2, the first axis of every array of batch", microbatches=2)
    refused(tx, "apply must be a function such as", error=TypeError, apply=3)
    widened = lambda own, x: layer(own, x).astype(jnp.bfloat16)  # noqa: E731
    refused(
        tx,
        "layer must return an x of the shapes and dtypes",
        error=TypeError,
        functions=(embed, widened, head),
    )
    several = functools.partial(refused, tx, "head must return the loss, a scalar; got shape (3, 5)")
    several(functions=(embed, layer, lambda own, x, data: x[..., 0]))
    differently = {"layers/0/q/*": None}
    tx = small_gum(weight_dimension_numbers=differently)
    refused(tx, "layers that the optimizer treats alike", params(stacked=False))


@pytest.mark.parametrize("make", [small_gum, functools.partial(go.muon, 1e-2)])
@pytest.mark.parametrize(
    ("leaf", "axes"),
    [("q/kernel", (0, 1)), ("norm/scale", (0, 1)), ("norm/scale", (1, 0)), ("mix/kernel", ((0, 1), 2))],
)
def test_a_matrix_across_the_layers_is_refused(make, leaf, axes):
    """Also if the axis of the layers is the first of all, with no block axis in front of it."""
    numbers = {f"layers/{leaf}": optax.contrib.MuonDimensionNumbers(*axes)}
    tx, start = make(weight_dimension_numbers=numbers), params(shapes={"mix": (1, WIDE)})
    message = f"layers/{leaf} count axis 0, the layers of the stack, among"
    refused(tx, message, start, state=jax.eval_shape(tx.init, start), per_layer=leaf == "q/kernel")


def test_a_state_of_another_optimizer_is_named():
    state = jax.eval_shape(go.muon(0.1).init, params())
    refused(small_gum(), re.compile("this state is not one of this optimizer .* is missing"), state=state)


def test_a_head_may_read_the_embedding():
    tx = small_gum()
    start = params()
    del start["head"]["lm_head"]

    def tied(own, x, data, table):
        return head(own | {"lm_head": {"kernel": table["embedding"].T}}, x, data)

    def whole(params, data):
        x = embed(params["embed"], data)
        x, _ = jax.lax.scan(lambda x, own: (layer(own, x), None), x, params["layers"])
        return tied(params["head"], x, data, params["embed"])

    data = [batch(i) for i in range(4)]
    expected, _, _ = run(ordinary(tx, whole), tx, start, data)
    found, _, _ = run(layer_by_layer(tx, head=tied, tied=True), tx, start, data)
    assert gap(found, expected) < 1e-5


def test_layers_read_what_is_closed_over_and_carry_trees():
    """A mask from the batch that every layer reads, and a penalty that every layer adds to."""
    tx = optax.adamw(1e-2)

    def functions(data):
        mask = (data[0] % 2)[..., None]

        def model(own, x):
            h = layer(own, x["h"] * mask)
            return {"h": h, "penalty": x["penalty"] + jnp.mean(h**2)}

        return model

    def start_of(own, data):
        return {"h": embed(own, data), "penalty": jnp.float32(0)}

    def end_of(own, x, data):
        return head(own, x["h"], data) + 0.1 * x["penalty"]

    def whole(params, data):
        x = start_of(params["embed"], data)
        x, _ = jax.lax.scan(lambda x, own: (functions(data)(own, x), None), x, params["layers"])
        return end_of(params["head"], x, data)

    def step(params, state, data):
        value, params, state = go.layerwise_update(tx, start_of, functions(data), end_of, data, state, params)
        return params, state, value

    data = [batch(i) for i in range(3)]
    expected, _, losses = run(ordinary(tx, whole), tx, params(), data)
    found, _, values = run(jax.jit(step), tx, params(), data)
    assert gap(found, expected) < 1e-5
    np.testing.assert_allclose(values, losses, rtol=1e-5)


def test_apply_takes_the_place_of_apply_updates():
    """It sees whole trees, in which the leaves of other turns are zeros, and the turn."""
    tx = optax.sgd(1.0)

    def halved(params, updates, *, context):
        whole = context.turn.whole(params)
        assert whole["layers"]["q"]["kernel"].shape == (LAYERS, WIDTH, WIDTH)
        assert params["layers"]["q"]["kernel"].shape == (1, WIDTH, WIDTH)
        return jax.tree.map(lambda p, u: p + u / 2, params, updates)

    found, _, _ = run(layer_by_layer(tx, apply=halved), tx, params(), [batch(0)])
    expected, _, _ = run(ordinary(optax.sgd(0.5)), tx, params(), [batch(0)])
    assert gap(found, expected) < 1e-6
