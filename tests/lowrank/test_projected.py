"""Projecting before the reduction gives the update of the mean gradient without forming that gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gum_optax as go

try:
    from jax.extend.core import jaxprs_in_params
except ImportError:  # jax 0.9
    from jax.core import jaxprs_in_params
from gum_optax._lowrank.gradient import ProjectedGradient
from gum_optax._matrices.view import plain_view

from helpers import LOW_RANK, gum_by_neuron

STEPS = 5  # two periods of three: two power steps, a power step


def users_own(key, gradient, previous):
    """A finder without a linear form of the gradient."""
    del key
    return jnp.linalg.qr(gradient @ gradient.mT @ previous)[0]


MAKERS = {
    "gum": functools.partial(go.gum, 1e-2, **LOW_RANK, full_rank_fraction=0.4),
    "golore": functools.partial(go.golore, 1e-2, **LOW_RANK, random_after=3),
    "sumo": functools.partial(
        go.sumo,
        1e-2,
        **LOW_RANK,
        residual=go.drop,
        find_subspace=go.subspace_iteration,
        orthogonalizer=go.newton_schulz,
    ),
    "muon": functools.partial(go.muon, 1e-2),
    "galore_muon, users_own": functools.partial(go.galore_muon, 1e-2, **LOW_RANK, find_subspace=users_own),
    "gum, svd_subspace": functools.partial(
        go.gum, 1e-2, **LOW_RANK, full_rank_fraction=0.4, find_subspace=go.svd_subspace
    ),
    "gum by neuron": functools.partial(gum_by_neuron, 1e-2),
}


def params():
    """A stack, a shape and its transpose, a vector, and a matrix no larger than the rank."""
    rng = np.random.default_rng(0)
    shapes = {"in": (12, 8), "layers": (3, 8, 8), "out": (8, 12), "few": (2, 12)}
    tree = {name: {"kernel": jnp.float32(rng.normal(size=shape) / 3)} for name, shape in shapes.items()}
    return tree | {"bias": jnp.zeros(12)}


def loss(params, batch):
    x, y = batch
    h = jnp.tanh(x @ params["in"]["kernel"])
    for kernel in params["layers"]["kernel"]:
        h = jnp.tanh(h @ kernel)
    return jnp.mean(
        (h @ params["out"]["kernel"] + x[:, :2] @ params["few"]["kernel"] + params["bias"] - y) ** 2
    )


def batches(step, microbatches):
    rng = np.random.default_rng(step)
    return tuple(jnp.float32(rng.normal(size=(microbatches, 8, 12))) for _ in range(2))


def plain_update(tx, batches, state, params):
    """The update of the mean gradient."""

    def mean_loss(params):
        return jnp.mean(jax.vmap(functools.partial(loss, params))(batches))

    value, gradient = jax.value_and_grad(mean_loss)(params)
    return value, *tx.update(gradient, state, params)


def projected(tx, batches, state, params):
    return go.projected_update(tx, loss, batches, state, params)


def run(update, tx, data):
    def step(held, batches):
        params, state = held
        value, updates, state = update(tx, batches, state, params)
        return (optax.apply_updates(params, updates), state), value

    step = jax.jit(step)
    held = params(), jax.jit(tx.init)(params())
    values = []
    for batches in data:
        held, value = step(held, batches)
        values.append(value)
    return held, np.asarray(values)


def gap(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)), default=0)


OF_THE_MEAN = [("gum", 1), *((name, 3) for name in MAKERS)]
RARELY = [("gum", 1), ("golore", 3)]


@pytest.mark.parametrize(
    ("name", "microbatches"),
    [pytest.param(*case, marks=[pytest.mark.long] * (case in RARELY)) for case in OF_THE_MEAN],
)
def test_it_is_the_update_of_the_mean_gradient(name, microbatches):
    data = [batches(step, microbatches) for step in range(STEPS)]
    (expected, state), losses = run(plain_update, MAKERS[name](), data)
    (found, other), values = run(projected, MAKERS[name](), data)
    assert gap(found, expected) < 1e-6
    np.testing.assert_allclose(values, losses, rtol=1e-5)
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, state)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jnp.integer):
            np.testing.assert_array_equal(a, b)  # counts, keys and draws


def test_a_gradient_that_is_not_finite_is_skipped_at_a_refresh_too():
    data = [batches(step, 2) for step in range(STEPS)]
    for place in (
        0,
        2,
        4,
    ):  # the first step, a step within a period, the refresh that the first two steps delay
        x, y = batches(place, 2)
        data.insert(place, (x, y.at[0, 0, 0].set(jnp.nan)))
    (found, state), _ = run(projected, MAKERS["gum"](), data)
    (expected, other), _ = run(projected, MAKERS["gum"](), [data[i] for i in (1, 3, 5, 6, 7)])
    assert int(state.skipped) == 3
    jax.tree.map(np.testing.assert_array_equal, (found, state.inner), (expected, other.inner))


def test_no_accumulator_has_the_size_of_a_projected_gradient():
    """Six microbatches of wide layers: scans of six carry means, and no float32[64,96] or its transpose."""
    shapes = {f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((64, 96), jnp.float32)} for i in range(4)}
    tx = go.gum(1e-2, rank=4, period=3, full_rank_fraction=1 / 4)

    def loss(params, x):
        return jnp.mean(sum(jnp.tanh(x @ layer["kernel"]) for layer in params.values()))

    def update(batches, state, params):
        return go.projected_update(tx, loss, batches, state, params)

    jaxpr = jax.make_jaxpr(update)(jnp.zeros((6, 2, 64)), jax.eval_shape(tx.init, shapes), shapes)
    found = list(scans(jaxpr.jaxpr, 6))
    sums = [v.aval for eqn in found for v in eqn.outvars]
    # One scan is for the step, two are for a power step.
    assert len(found) == 1 + 2
    # Only the sampled block of one of the four layers is in the loop of the step.
    assert [x.size for x in sums if x.size >= 64 * 96] == [64 * 96]
    step = found[-1]
    held = sum(v.aval.size for v in step.outvars)
    assert (
        held == 1 + 4 * 4 * 96 + 4 * 96 + 64 * 96
    )  # the loss, R, a row for the energy outside the subspace, the block


def scans(jaxpr, length):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan" and eqn.params["length"] == length:
            yield eqn
        for sub in jaxprs_in_params(eqn.params):
            yield from scans(sub, length)


def test_the_energy_outside_is_right_in_the_mean():
    """The z-score over 400 draws of the signs is below 4."""
    rng = np.random.default_rng(0)
    p = jnp.float32(np.linalg.qr(rng.normal(size=(8, 3)))[0])
    g = jnp.float32(rng.normal(size=(8, 12)))
    outside = np.square(g - p @ p.T @ g).sum()

    def estimate(key):
        sketch = ProjectedGradient(Immediate([g]), [0], [plain_view(g)])
        r = sketch.coordinates([p])
        (energy,) = sketch.energies(key[None], [p], r)
        return (energy.whole - energy.inside) * jnp.square(energy.scale)

    found = np.asarray(jax.vmap(estimate)(jax.random.split(jax.random.key(0), 400)))
    assert abs(found.mean() - outside) < 4 * found.std() / 400**0.5
    assert found.std() > 0.1 * outside


class Immediate:
    """Replays measurements immediately."""

    def __init__(self, leaves):
        self.leaves = leaves

    def mean(self, places, f):
        return f([self.leaves[i] for i in places])


def test_flax_nnx_parameters_and_a_chain_behind_the_rule():
    model = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    tx = optax.chain(go.galore_muon(1e-2, **LOW_RANK), optax.scale(0.5))

    def loss(params, x):
        return jnp.mean(jnp.square(nnx.merge(graph, params)(x)))

    x = jnp.ones((2, 4, 6))
    value, updates, state = jax.jit(functools.partial(go.projected_update, tx, loss))(
        x, tx.init(params), params
    )
    gradient = jax.grad(lambda p: jnp.mean(jax.vmap(lambda x: loss(p, x))(x)))(params)
    expected, _ = tx.update(gradient, tx.init(params), params)
    assert gap(updates, expected) < 1e-6
    np.testing.assert_allclose(value, loss(params, x[0]), rtol=1e-6)
    assert int(go.metrics(state)["refresh_count"]) == 1


def refused(tx, error, message, data=None):
    batch = batches(0, 2) if data is None else data
    state = jax.eval_shape(tx.init, params())
    with pytest.raises(error, match=re.escape(message)):  # traced only, not run
        jax.eval_shape(lambda state, params: projected(tx, batch, state, params), state, params())


def test_what_needs_the_whole_gradient_is_refused():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), MAKERS["gum"]())
    refused(clipped, ValueError, "clipping by a global norm is impossible")
    refused(optax.apply_if_finite(MAKERS["gum"](), 3), ValueError, "leave that out")
    refused(go.sumo(1e-2, **LOW_RANK, find_subspace=go.track_subspace), ValueError, "residual=gum_optax.drop")
    refused(go.frugal(1e-2, **LOW_RANK), ValueError, "residual=gum_optax.drop")


def test_axes_outside_of_a_shard_map_and_a_loss_that_is_no_function_are_refused():
    tx, state = MAKERS["gum"](), MAKERS["gum"]().init(params())
    with pytest.raises(
        NameError, match=r"axes has 'data', which is no axis of a mesh here: call .* jax\.shard_map"
    ):
        go.projected_update(tx, jnp.sum, jnp.ones((2, 3)), state, params(), axes="data")
    with pytest.raises(TypeError, match="loss must be a function such as lambda params, batch"):
        go.projected_update(tx, 3, jnp.ones((2, 3)), state, params())


def test_what_is_not_finite_stops_the_rule_that_sees_it_and_no_other():
    kinds = dict.fromkeys(params(), "low") | {"bias": "frozen"}
    tx = optax.partition({"low": MAKERS["gum"](), "frozen": optax.set_to_zero()}, kinds)

    def spoilt(params, batch):
        return loss(params | {"bias": 0}, batch) + jnp.sum(
            jnp.sqrt(params["bias"])
        )  # the gradient of this leaf is infinite

    @jax.jit
    def step(state, params):
        return go.projected_update(tx, spoilt, batches(0, 2), state, params)

    _, updates, state = step(tx.init(params()), params())
    assert updates["layers"]["kernel"].any()
    assert int(go.metrics(state)["skipped_steps"]) == 0


@pytest.mark.parametrize(
    "tx",
    [
        go.galore_muon(0.1, **LOW_RANK),
        optax.chain(
            optax.clip_by_global_norm(0.1), go.muon(0.1)
        ),  # nothing is projected, so nothing is refused
        optax.adamw(0.1),
    ],
    ids=["galore_muon", "clipped muon", "adamw"],
)
def test_trees_with_holes_and_complex_leaves(tx):
    tree = {"kernel": jnp.ones((4, 6)), "hole": optax.MaskedNode(), "none": None, "phase": jnp.ones(3) + 1j}

    def square(params, x):
        return jnp.mean(x) * jnp.sum(params["kernel"] ** 2) + jnp.sum(jnp.abs(params["phase"] - 2) ** 2)

    for data in (jnp.ones((1, 2)), jnp.ones((2, 2))):
        step = jax.jit(lambda state, tree, data=data: go.projected_update(tx, square, data, state, tree))
        _, updates, _ = step(tx.init(tree), tree)
        gradient = jax.grad(square)(tree, data[0])
        expected, _ = jax.jit(tx.update)(gradient, tx.init(tree), tree)
        assert gap(updates, expected) < 1e-6
        assert updates["phase"].imag.any()


@pytest.mark.parametrize(
    "data", [(), jnp.float32(1), jnp.zeros((0, 8, 12)), (jnp.zeros((2, 8, 12)), jnp.zeros((3, 8, 12)))]
)
def test_batches_count_microbatches(data):
    refused(MAKERS["gum"](), ValueError, "batches must be arrays whose first axis counts", data)
