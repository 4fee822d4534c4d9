"""Views and routing: dimension numbers, Flax Linen, NNX, scanned layers."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers as Dims

import gum_optax as go
from gum_optax._matrices.dimension_numbers import LAST_TWO, names_of

from helpers import muon_rule, run

SPLIT_INPUT, SPLIT_OUTPUT = Dims(-3, (-2, -1)), Dims((-3, -2), -1)
SPLIT_FUSED = Dims(-4, (-3, -2, -1))
HEADS_FIRST = Dims(-2, (-3, -1))


def seen_by(inner_shapes):
    """A rule that records the shapes of its leaves."""

    def update(updates, state, params=None):
        inner_shapes.append(jax.tree.map(jnp.shape, updates))
        return updates, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@st.composite
def leaves_with_axes(draw):
    """A shape of 2 to 5 axes and a partition of the axes, as non-negative or negative numbers."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=5)))
    axes = draw(st.permutations(range(len(shape))))
    first = draw(st.integers(1, len(axes) - 1))
    second = draw(st.integers(1, len(axes) - first))
    sign = draw(st.sampled_from([0, len(shape)]))
    reduction, output = axes[:first], axes[first : first + second]
    return shape, tuple(a - sign for a in reduction), tuple(a - sign for a in output)


@given(leaves_with_axes(), st.booleans())
def test_the_view_is_a_bijection_onto_blocks_and_the_batch_axes_may_stand_anywhere(leaf, wide):
    shape, reduction, output = leaf
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    shapes = []
    tx = go.as_matrices(seen_by(shapes), Dims(reduction, output), wide=wide)
    back, _ = tx.update({"w": x}, tx.init({"w": x}))
    np.testing.assert_array_equal(back["w"], x)
    fan_in = np.prod([shape[a] for a in reduction], dtype=int)
    fan_out = np.prod([shape[a] for a in output], dtype=int)
    m, n = (fan_out, fan_in) if wide and fan_in > fan_out else (fan_in, fan_out)
    named = {axis % x.ndim for axis in reduction + output}
    batch = tuple(size for axis, size in enumerate(shape) if axis not in named)
    assert shapes == [{"w": (*batch, m, n)}]


def test_each_block_is_the_matrix_that_its_axes_name(rng):
    x = np.float32(rng.normal(size=(3, 5, 2, 4)))  # (embed, layers, heads, head_dim), as in a scan on axis 1
    tx = go.as_matrices(optax.stateless(lambda u, p: jax.tree.map(go.polar, u)), Dims(0, (2, 3)))
    step, _ = tx.update(x, tx.init(x))
    for layer in range(5):
        u, _, vt = np.linalg.svd(x[:, layer].reshape(3, 8), full_matrices=False)
        np.testing.assert_allclose(step[:, layer].reshape(3, 8), u @ vt, atol=1e-5)


def test_scale_by_shape_uses_fan_in_and_fan_out_of_the_full_weight():
    ones = {"tall": jnp.ones((9, 4)), "wide": jnp.ones((4, 9)), "stack": jnp.ones((4, 3, 2, 5))}
    dims = {"tall": Dims(0, 1), "wide": Dims(0, 1), "stack": Dims((0, 2), 3)}
    step, _ = go.scale_by_shape(dims, 0.2).update(ones, optax.EmptyState())
    for name, largest in (("tall", 9), ("wide", 9), ("stack", 8)):
        np.testing.assert_allclose(step[name], 0.2 * largest**0.5, rtol=1e-6)
    step, _ = go.scale_by_shape(dims, None).update(ones, optax.EmptyState())
    for name, ratio in (("tall", 1), ("wide", 9 / 4), ("stack", 1)):
        np.testing.assert_allclose(step[name], ratio**0.5, rtol=1e-6)


def test_the_shape_factor_of_a_projected_block_is_that_of_the_full_weight(rng):
    """Consistent RMS: a full-rank orthogonal step has RMS 0.2 lr, a step of rank r has 0.2 lr √(r/m)."""
    g = {"w": np.float32(rng.normal(size=(4, 8, 16)))}
    polar = {"orthogonalizer": go.polar, "momentum": 0.0}
    full, _ = run(go.muon(1.0, **polar), [g])
    low, _ = run(go.galore_muon(1.0, rank=2, **polar), [g])
    np.testing.assert_allclose(np.sqrt(np.mean(full[0]["w"] ** 2)), 0.2, rtol=1e-4)
    np.testing.assert_allclose(np.sqrt(np.mean(low[0]["w"] ** 2)), 0.2 * np.sqrt(2 / 8), rtol=1e-4)


def entries(params):
    """The entries by path, with joined names."""
    leaves = jax.tree_util.tree_leaves_with_path(
        go.hidden_matrices(params), is_leaf=lambda x: x is None or isinstance(x, Dims)
    )
    return {"/".join(names_of(path)): entry for path, entry in leaves}


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm(name="ln_1")(x))
        x = x + nn.Dense(6, name="down")(nn.Dense(10, name="up")(nn.RMSNorm()(x)))
        return x, None


class LinenModel(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 6, name="token_embedder")(tokens)
        if self.scan:
            stack = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack(name="layers")(x, None)
        else:
            x, _ = LinenBlock(name="layers")(x)
        return nn.Dense(11, name="lm_head")(nn.LayerNorm(name="final_norm")(x))


LINEN_MATRICES = {
    "layers/attention/query/kernel": SPLIT_INPUT,
    "layers/attention/key/kernel": SPLIT_INPUT,
    "layers/attention/value/kernel": SPLIT_INPUT,
    "layers/attention/out/kernel": SPLIT_OUTPUT,
    "layers/up/kernel": LAST_TWO,
    "layers/down/kernel": LAST_TWO,
}


@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scanned"])
def test_linen_matrices_are_found_and_only_they(scan):
    model = LinenModel(scan)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    found = entries(params)
    assert {name: entry for name, entry in found.items() if entry} == LINEN_MATRICES
    stacked = {"layers/attention/query/bias", "layers/up/bias", "layers/RMSNorm_0/scale"}
    assert stacked < set(found)  # two axes in scanned layers, but no matrices
    state = jax.eval_shape(go.muon(1e-3).init, params)
    assert isinstance(state, go.SkipNonFiniteState)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=6, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 10, rngs=rngs)
        self.experts = nnx.vmap(lambda rngs: nnx.Linear(6, 10, rngs=rngs))(nnx.Rngs(0).split(3))
        self.head = nnx.Linear(6, 11, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = self.norm(x + self.attention(x))
        h = self.up(x) + sum(x @ self.experts.kernel[i] for i in range(3))
        return self.head(h[..., :6])


NNX_MATRICES = {
    "attention/query/kernel": SPLIT_INPUT,
    "attention/key/kernel": SPLIT_INPUT,
    "attention/value/kernel": SPLIT_INPUT,
    "attention/out/kernel": SPLIT_OUTPUT,
    "up/kernel": LAST_TWO,
    "experts/kernel": LAST_TWO,
}


def test_nnx_matrices_are_found_with_and_without_the_variables_around_them():
    params = nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)
    for tree in (params, nnx.to_pure_dict(params)):
        assert {name: entry for name, entry in entries(tree).items() if entry} == NNX_MATRICES


@pytest.mark.parametrize("make", [go.muon, lambda lr: go.gum(lr, rank=2, period=2)], ids=["muon", "gum"])
def test_nnx_optimizer_trains(make):
    model = NnxModel(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, make(1e-2), wrt=nnx.Param)
    tokens = jnp.arange(8).reshape(2, 4)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.square(model(tokens)).mean())(model)
        optimizer.update(model, gradients)

    for _ in range(3):
        step(model, optimizer)
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), before, nnx.to_pure_dict(nnx.state(model, nnx.Param))
    )
    assert moved["attention"]["query"]["kernel"]
    assert moved["embed"]["embedding"]
    assert moved["norm"]["scale"]


def shaped(**shapes):
    """A tree of shapes from paths to shapes; `__` separates names."""
    tree: dict = {}
    for path, shape in shapes.items():
        *parents, last = path.split("__")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


PLAIN, SPLIT = {LAST_TWO}, {SPLIT_INPUT, SPLIT_OUTPUT}
ATTENTION = {
    "split": (shaped(a__query__kernel=(6, 2, 3), a__out__kernel=(2, 3, 6)), SPLIT),
    "grouped_queries": (
        shaped(a__query__kernel=(6, 2, 3), a__key__kernel=(6, 1, 3), a__out__kernel=(2, 3, 6)),
        SPLIT,
    ),
    "split_and_scanned": (shaped(a__q_proj__kernel=(4, 6, 2, 3), a__o_proj__kernel=(4, 2, 3, 6)), SPLIT),
    "fused": (
        shaped(a__qkv__kernel=(6, 3, 2, 3), a__out__kernel=(2, 3, 6)),
        {SPLIT_FUSED, SPLIT_OUTPUT},
    ),
    "split_without_output": (shaped(a__query__kernel=(6, 2, 3)), {SPLIT_INPUT}),
    "split_with_bias": (
        {"a": {"query": shaped(kernel=(6, 7, 3), bias=(7, 3))}},
        {SPLIT_INPUT, None},
    ),
    "stack": (shaped(a__query__kernel=(5, 6, 6), a__out__kernel=(5, 6, 6)), PLAIN),
    "stack_of_grouped_queries": (
        shaped(a__q__kernel=(5, 6, 6), a__k__kernel=(5, 6, 2), a__o__kernel=(5, 6, 6)),
        PLAIN,
    ),
    "stack_of_stacks": (shaped(a__query__kernel=(2, 5, 6, 6), a__out__kernel=(2, 5, 6, 6)), PLAIN),
    "stack_without_output": (shaped(a__query__kernel=(5, 8, 8)), PLAIN),
    "stack_with_bias": ({"a": {"query": shaped(kernel=(9, 6, 6), bias=(9, 6))}}, PLAIN | {None}),
    "feed_forward_stack": (shaped(mlp__wi__kernel=(5, 6, 9), mlp__wo__kernel=(5, 9, 6)), PLAIN),
    "convolution": (shaped(attn_1__q__kernel=(1, 1, 6, 6)), PLAIN),
    # Tunix's LLaMA and Qwen call their kernels `w`, as Haiku's layers do.
    "einsum": (
        shaped(attn__q_proj__w=(6, 2, 3), attn__k_proj__w=(6, 1, 3), attn__o_proj__w=(2, 3, 6)),
        SPLIT,
    ),
    "stack_of_w": (shaped(a__q__w=(5, 6, 6), a__o__w=(5, 6, 6)), PLAIN),
    "gemma": (
        shaped(
            attn__q_einsum__w=(2, 6, 3), attn__kv_einsum__w=(2, 1, 6, 3), attn__attn_vec_einsum__w=(2, 3, 6)
        ),
        {HEADS_FIRST, SPLIT_OUTPUT},
    ),
    "gemma_scanned": (
        shaped(attn__qkv_einsum__w=(4, 3, 2, 6, 3), attn__attn_vec_einsum__w=(4, 2, 3, 6)),
        {HEADS_FIRST, SPLIT_OUTPUT},
    ),
    # A leaf with that name at the root is in no module, so it has no siblings.
    "root": (shaped(w=(6,), a__w=(3, 4, 6)) | shaped(kernel=(4, 6), a2__kernel=(3, 4, 6)), PLAIN | {None}),
    "gemma_feed_forward": (shaped(mlp__gating_einsum__w=(2, 9, 6), mlp__linear__w=(9, 6)), PLAIN),
}


@pytest.mark.parametrize(("tree", "expected"), ATTENTION.values(), ids=ATTENTION)
def test_split_heads_are_told_from_stacks_of_plain_matrices(tree, expected):
    """Scanned `nn.Dense` queries have three axes too; the other side of the attention distinguishes them."""
    assert set(entries(tree).values()) == expected


@pytest.mark.parametrize(
    "path",
    ["embed/embedding", "wte/embedding", "pos_emb", "lm_head/kernel", "head/kernel", "logits_dense/kernel",
     "decoder/decoder_norm/scale", "ln_f/scale", "layers/pre_attention_norm/scale", "layers/mlp/bias",
     "relative_position_bias", "classifier/kernel", "unembed/kernel", "layers/b", "cls",
     "ClassificationHead_0/kernel", "ValueHead_0/Dense_0/kernel", "MLMHead_0/kernel", "LayerNorm_0/scale"],
)  # fmt: skip
def test_embeddings_heads_norms_and_biases_are_never_matrices(path):
    tree = leaf = jnp.zeros((4, 6))
    for name in reversed(path.split("/")):
        tree = {name: tree}
    assert jax.tree.leaves(go.hidden_matrices(tree)) == []
    del leaf


@pytest.mark.parametrize(
    "path",
    ["MultiHeadDotProductAttention_0/out_kernel", "heads/kernel", "layers/0/mlp/wi/kernel", "Dense_0/kernel",
     "router/gate/kernel", "conv/kernel", "self_attention/c_attn/kernel", "PreNormBlock_0/Dense_0/kernel",
     "NormalizingFlow_0/Dense_0/kernel", "ensemble/Dense_0/kernel", "members/w"],
)  # fmt: skip
def test_names_that_only_look_like_a_head_or_a_norm_are_matrices(path):
    tree = jnp.zeros((4, 6))
    for name in reversed(path.split("/")):
        tree = {name: tree}
    assert list(entries(tree).values()) == [LAST_TWO]


def test_vectors_empty_leaves_and_none_are_not_matrices():
    tree = {"a": jnp.zeros(3), "b": jnp.zeros((0, 4)), "c": None, "d": jnp.zeros(())}
    assert go.hidden_matrices(tree) == {"a": None, "b": None, "c": None, "d": None}


def test_the_users_dimension_numbers_decide(rng):
    """MaxText scans on axis 1: the leaf is one stack of 5 blocks, not 3 matrices of (5, 4)."""
    g = {"kernel": np.float32(rng.normal(size=(3, 5, 4))), "embedding": np.float32(rng.normal(size=(7, 3)))}
    tree = {"kernel": Dims(0, 2), "embedding": None}

    def by_path(params):  # gets every leaf, as at `init`
        return {name: Dims(0, 2) if leaf.ndim == 3 else None for name, leaf in params.items()}

    for spec in (tree, by_path):
        updates, _ = run(
            go.muon(1.0, momentum=0.0, orthogonalizer=go.polar, weight_dimension_numbers=spec), [g]
        )
        scaled = updates[0]["kernel"] / (-0.2 * 2)
        for layer in range(5):
            np.testing.assert_allclose(scaled[:, layer] @ scaled[:, layer].T, np.eye(3), atol=1e-4)
        np.testing.assert_allclose(np.abs(updates[0]["embedding"]), 1, rtol=1e-4)  # Adam's first step


def test_others_replaces_the_default_adamw(rng):
    g = {"kernel": np.float32(rng.normal(size=(3, 4))), "bias": np.float32(rng.normal(size=4))}
    updates, _ = run(go.gum(0.1, rank=2, others=optax.sgd(1.0)), [g])
    np.testing.assert_array_equal(updates[0]["bias"], -g["bias"])


def test_weight_decay_is_decoupled_masked_and_shared_with_the_default_others(rng):
    params = {"a": {"kernel": jnp.ones((3, 4))}, "b": {"kernel": jnp.ones((3, 4))}, "bias": jnp.ones(4)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    mask = {"a": {"kernel": True}, "b": {"kernel": False}, "bias": True}

    def all_leaves(tree):
        return {"a": {"kernel": tree["a"]["kernel"].ndim == 2}, "b": {"kernel": True}, "bias": True}

    for given_mask in (mask, all_leaves):
        updates, _ = run(go.gum(0.1, rank=2, weight_decay=0.5, weight_decay_mask=given_mask), [zeros], params)
        np.testing.assert_allclose(updates[0]["a"]["kernel"], -0.05, rtol=1e-6)
        np.testing.assert_allclose(updates[0]["b"]["kernel"], 0 if given_mask is mask else -0.05, rtol=1e-6)
        np.testing.assert_allclose(updates[0]["bias"], -0.05, rtol=1e-6)


def test_rules_take_leaves_of_any_stack(rng):
    """Leading axes are blocks without `as_matrices`."""
    g = np.float32(rng.normal(size=(2, 3, 4, 6)))
    rule = go.unbiased_low_rank(muon_rule(), 2, 2, 0.4, find_subspace=go.svd_subspace)
    a, _ = run(rule, [g])
    b, _ = run(rule, [g.reshape(6, 4, 6)])
    np.testing.assert_allclose(a[0].reshape(6, 4, 6), b[0], atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (0, 4, 6)])
@pytest.mark.parametrize("make", [go.muon, functools.partial(go.galore, rank=2), go.scion, go.hfac])
def test_an_empty_leaf_with_dimension_numbers_is_refused_by_name(make, shape):
    params = {"kernel": jnp.zeros(shape), "up": jnp.ones((4, 6))}
    with pytest.raises(ValueError, match=re.escape(f"leaf ['kernel'] of shape {shape} is empty")):
        make(0.1, weight_dimension_numbers={"*": go.LAST_TWO}).init(params)
    tx = make(0.1, weight_dimension_numbers={"kernel*": None, "*": go.LAST_TWO})
    (updates,), _ = run(tx, [params])
    assert updates["kernel"].shape == shape


def test_a_bare_low_rank_rule_projects_no_empty_stack():
    params = {"none": jnp.zeros((0, 4, 6)), "some": jnp.ones((2, 4, 6))}
    (steps,), state = run(go.low_rank(optax.trace(0.9), rank=2, period=3), [params])
    assert steps["none"].shape == (0, 4, 6)
    assert set(jax.tree.leaves(state.projectors)[0].shape) == {2, 4}
