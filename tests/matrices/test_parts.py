"""Fused kernels: each part is a separate matrix, and nothing copies a part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers as Dims

import gum_optax as go

from helpers import AMPLIFIED, CORE_AND_LONG, OPTIMIZERS

STEPS = 4
GROUPED = go.Parts((8, 4, 4))


def layers(rng, shape=(6, 16), count=2):
    return {f"layer_{i}": {"qkv": {"kernel": np.float32(rng.normal(size=shape))}} for i in range(count)}


def apart(tree, sizes=(8, 4, 4)):
    """The same model with one kernel per part."""
    ends = np.cumsum(sizes)[:-1]
    return jax.tree.map(lambda x: tuple(np.split(x, ends, axis=-1)), tree)


def steps_of(tx, gradients):
    state, update = jax.jit(tx.init)(gradients[0]), jax.jit(tx.update)
    found = []
    for g in gradients:
        u, state = update(g, state, g)
        found.append(u)
    return found, state


@pytest.mark.parametrize("name", CORE_AND_LONG)
def test_an_optimizer_of_parts_is_that_of_separate_kernels(name, rng):
    make, arguments = OPTIMIZERS[name]
    gradients = [layers(rng) for _ in range(STEPS)]
    fused, state = steps_of(make(0.1, weight_dimension_numbers={"*": GROUPED}, **arguments), gradients)
    plain, other = steps_of(
        make(0.1, weight_dimension_numbers={"*": go.LAST_TWO}, **arguments), [apart(g) for g in gradients]
    )
    for a, b in zip(fused, plain, strict=True):
        for layer in a:
            whole = np.concatenate(b[layer]["qkv"]["kernel"], axis=-1)
            np.testing.assert_allclose(a[layer]["qkv"]["kernel"], whole, atol=AMPLIFIED)
    shapes = [sorted(x.shape for x in jax.tree.leaves(tree)) for tree in (state, other)]
    assert shapes[0] == shapes[1]


KERNELS = {
    "queries, keys and values": ((6, 24), go.Parts((8, 8, 8)), [(6, 8)] * 3),
    "gate and up of PyTorch": ((12, 5), go.Parts((6, 6), axis=-2, numbers=go.OUT_IN), [(5, 6)] * 2),
    "every head": ((6, 16), go.Parts(head_dim=4), [(6, 4)] * 4),
    "every head of grouped queries": ((6, 16), go.Parts((8, 4, 4), head_dim=4), [(6, 4)] * 4),
    "latent attention": ((5, 2, 7), go.Parts((3, 4), numbers=go.SPLIT_HEADS_INPUT), [(5, 6), (5, 8)]),
    "every head of latent attention": (
        (5, 2, 7),
        go.Parts((3, 4), numbers=Dims(0, 2)),
        [(5, 3)] * 2 + [(5, 4)] * 2,
    ),
    "an axis of parts": ((6, 3, 2, 4), Dims(0, (2, 3)), [(6, 8)] * 3),
    "a stack": ((3, 6, 16), GROUPED, [(6, 8)] * 3 + [(6, 4)] * 6),
    "heads of the output": ((16, 6), go.Parts(axis=0, head_dim=4), [(4, 6)] * 4),
}


@pytest.mark.parametrize(("shape", "entry", "blocks"), KERNELS.values(), ids=KERNELS)
def test_each_part_is_orthogonal_by_itself(shape, entry, blocks, rng):
    """The singular values of each part are one, and the squares add up."""
    g = {"kernel": np.float32(rng.normal(size=shape))}
    rule = go.as_matrices(optax.stateless(lambda tree, _: jax.tree.map(go.polar, tree)), entry)
    seen = []

    def noting(tree, _):
        seen.extend(x.shape for x in jax.tree.leaves(tree))
        return tree

    go.as_matrices(optax.stateless(noting), entry, wide=False).update(g, optax.EmptyState())
    assert sorted(x[-2:] for x in seen for _ in range(int(np.prod(x[:-2])))) == sorted(blocks)
    step, _ = rule.update(g, rule.init(g))
    assert step["kernel"].shape == shape
    np.testing.assert_allclose(np.sum(step["kernel"] ** 2), sum(map(min, blocks)), rtol=1e-4)
    assert float(np.sum(step["kernel"] * g["kernel"])) > 0


def test_a_part_is_scaled_by_its_own_shape(rng):
    g = {"kernel": np.float32(rng.normal(size=(4, 20)))}
    tx = go.muon(1.0, momentum=0.0, orthogonalizer=go.polar, weight_dimension_numbers=go.Parts((16, 4)))
    step, _ = tx.update(g, tx.init(g))
    for part, largest, rms in ((step["kernel"][:, :16], 16, 0.25), (step["kernel"][:, 16:], 4, 0.5)):
        np.testing.assert_allclose(np.sqrt(np.mean(part**2)), 0.2 * largest**0.5 * rms, rtol=1e-3)


@pytest.mark.parametrize(
    "rank", [pytest.param(2, marks=pytest.mark.long), 4], ids=["all parts projected", "queries only"]
)
def test_projected_update_projects_parts(rank, rng):
    """Rank 4 does not project keys and values, so they need their whole gradient."""
    params = layers(rng) | {"out": np.float32(rng.normal(size=(16, 1)))}
    batches = np.float32(rng.normal(size=(2, 5, 6)))
    tx = go.gum(
        0.1, rank=rank, period=2, full_rank_fraction=0.3, weight_dimension_numbers={"*/kernel": GROUPED}
    )

    def loss(params, x):
        hidden = sum(jnp.tanh(x @ params[f"layer_{i}"]["qkv"]["kernel"]) for i in range(2))
        return jnp.mean((hidden @ params["out"]) ** 2)

    state = tx.init(params)
    other = state
    for _ in range(3):
        _, updates, state = jax.jit(lambda s: go.projected_update(tx, loss, batches, s, params))(state)
        mean = jax.tree.map(lambda *x: sum(x) / 2, *(jax.grad(loss)(params, x) for x in batches))
        wanted, other = jax.jit(tx.update)(mean, other, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=AMPLIFIED), updates, wanted)


def test_flax_nnx_keeps_parts_in_variables_of_their_own():
    class Model(nnx.Module):
        def __init__(self):
            self.qkv = nnx.Linear(6, 16, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.qkv(x)

    model = Model()
    tx = go.gum(0.1, rank=2, period=2, weight_dimension_numbers={"qkv/kernel": GROUPED})
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 6))) ** 2))(model))

    before = model.qkv.kernel[...]
    for _ in range(3):
        step(model, optimizer)
    assert bool((model.qkv.kernel[...] != before).any())
    projectors = [x for path, x in nnx.to_flat_state(nnx.state(optimizer)) if "projectors" in path]
    assert sorted(x.shape for x in jax.tree.leaves(projectors)) == [(4, 2), (4, 2)]


@pytest.mark.parametrize(
    ("parts", "message"),
    [(go.Parts((8, 4)), r"\['kernel'\] add up to 12.*has 16"), (go.Parts((8, 8), axis=2), "names? axes"),
     (go.Parts((10, 6), head_dim=4), "head_dim 4 does not divide"), (go.Parts((16, 0)), "at least 1"),
     (go.Parts((3, 3), axis=0, numbers=Dims(1, 1)), "overlap|neither"), (go.Parts((8.0, 8.0)), "integer")],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_at_init(parts, message):
    params = {"kernel": jnp.zeros((6, 16))}
    with pytest.raises((ValueError, TypeError), match=message):
        go.muon(0.1, weight_dimension_numbers={"*": parts}).init(params)
