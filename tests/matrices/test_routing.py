"""Which leaf of a real model is which matrix: the policy on real parameter trees, and overrides by users."""

import functools
import json
import sys
import warnings
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import meta
from optax.contrib import MuonDimensionNumbers as Dims

import gum_optax as go
from gum_optax._matrices.decisions import Decisions
from gum_optax._matrices.dimension_numbers import leaf_names
from gum_optax._matrices.rules.policy import readings

from helpers import run

MODELS = json.loads((Path(__file__).parent / "models.json").read_text())
NO_MATRIX = {"embedding", "head", "norm", "bias", "vector", "position", "token", "depthwise conv", "other"}
# Leaves that the policy intentionally reads otherwise than the model's author, with the reason.
MEANT = {
    # Two matrices on a separate axis are two blocks, not one fused matrix.
    "gating_einsum": "blocks", "kv_einsum": "blocks", "Wi/weight": "blocks",
    # The layer from pixels to features is an embedding by the name of its module.
    "patch_embedding": "embedding", "patch_embeddings": "embedding", "embedding/kernel": "embedding",
    "embedding_layer": "embedding",
    # No name, no bias and no other side of an attention identifies these leaves.
    "correction_coefs": "unknown", "prediction_coefs": "unknown", "per_layer_input_projection": "unknown",
    "output_proj": "unknown", "einsum/kernel": "unknown",
    # The module would tell, but this test has no modules: see the Equinox tests below.
    "c1/weight": "module", "ct/weight": "module", "dw/weight": "module", "grp/weight": "module",
    "lora_A/weight": "module", "lora_B/weight": "module",
}  # fmt: skip


def tree_of(leaves, *, named=True):
    """The parameters as a nested dict, with Linen boxes for axes with names."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        x = jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.float32)
        node[last] = meta.Partitioned(x, tuple(leaf["axes"])) if named and leaf.get("axes") else x
    return tree


def entries(params, spec=None):
    """The entries by path."""
    names = ["/".join(x) for x in leaf_names(params)]
    return dict(zip(names, Decisions(spec).of(params), strict=True))


def sides(shape, reduction, output):
    """The axes of each side that are longer than one."""
    several = [axes if isinstance(axes, tuple | list) else (axes,) for axes in (reduction, output)]
    return [{axis % len(shape) for axis in axes if shape[axis] > 1} for axes in several]


@pytest.mark.parametrize("name", MODELS)
def test_the_policy_reads_a_real_model_as_its_author_does(name):
    leaves = MODELS[name]["leaves"]
    found = entries(tree_of(leaves))
    wrong = {}
    for path, leaf in leaves.items():
        if any(part in path for part in MEANT):
            continue
        entry, shape = found[path], leaf["shape"]
        wanted = leaf["dims"] and sides(shape, *leaf["dims"])
        if wanted and not all(wanted):
            wanted = None  # a side of one
        got = entry and sides(shape, *entry)
        # Haliax and Equinox tell fan-in from fan-out by the module, Hugging Face's GPT-2 does not tell them;
        # the matrix is the same either way.
        as_one = sorted if name.startswith(("levanter", "equinox", "hf gpt2")) else list
        if (wanted and as_one(map(sorted, wanted))) != (got and as_one(map(sorted, got))):
            wrong[path] = (shape, leaf["kind"], leaf["dims"], entry)
    assert not wrong


def test_without_the_matrices_or_the_other_leaves_one_leaf_in_50_is_read_otherwise():
    """The page says so; `optax.partition` around an optimizer makes such trees."""
    same = []
    for model in MODELS.values():
        whole = entries(tree_of(model["leaves"]))
        for are_matrices in (True, False):
            some = {x: y for x, y in model["leaves"].items() if (whole[x] is not None) == are_matrices}
            same += [entry == whole[path] for path, entry in entries(tree_of(some)).items()]
    assert len(same) > 400
    assert 0.98 <= np.mean(same) < 1


def test_the_meant_readings_are_of_leaves_that_exist():
    paths = [path for model in MODELS.values() for path in model["leaves"]]
    assert not [part for part in MEANT if not any(part in path for path in paths)]


def test_names_of_axes_alone_give_maxtext_its_state():
    """LLaMA-3-8B scanned on axis 1: 10.71 GiB, 7 projected kernels, as with MaxText's dimension numbers."""
    leaves = MODELS["maxtext llama3_8b"]["leaves"]
    params = tree_of(leaves)
    numbers = {path: x["dims"] and Dims(*map(tuple, x["dims"])) for path, x in leaves.items()}
    told = go.gum(1e-3, weight_dimension_numbers=numbers)
    reports = [go.memory_report(tx, params) for tx in (go.gum(1e-3), told)]
    assert reports[0].state == reports[1].state
    assert sum(reports[0].state.values()) / 2**30 == pytest.approx(10.71, abs=0.01)
    assert sum("projectors" in leaf.state for leaf in reports[0].leaves) == 7


class Scanned(nnx.Module):
    """The layers are on axis 1 by the metadata of the variables; sizes alone do not tell that."""

    def __init__(self):
        def init(key, shape, dtype=jnp.float32):
            return jax.random.normal(key, shape, dtype)

        told = {"out_sharding": ("embed", "layers", "mlp"), "eager_sharding": False}
        self.up = nnx.Param(init(jax.random.key(0), (6, 5, 9)), **told)

    def __call__(self, x):
        return sum(x @ self.up[:, i] for i in range(5))


@pytest.mark.parametrize(
    "make",
    [go.muon, optax.inject_hyperparams(go.muon, static_args=("orthogonalizer",))],
    ids=["muon", "inject_hyperparams"],
)
def test_flax_nnx_trains_by_the_names_that_only_init_sees(make):
    """`nnx.Optimizer` passes arrays without their variables to `update`."""
    model = Scanned()
    optimizer = nnx.Optimizer(model, make(1.0, momentum=0.0, orthogonalizer=go.polar), wrt=nnx.Param)
    before = model.up[...]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 6)), jnp.float32)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(jnp.tanh(m(x)) ** 2))(model))

    step(model, optimizer)
    moved = (model.up[...] - before) / (-0.2 * 3)
    for layer in range(5):
        np.testing.assert_allclose(moved[:, layer] @ moved[:, layer].T, np.eye(6), atol=1e-3)


PAIRS = {
    "diffusers": ("to_q/kernel", "to_out/kernel"),
    "underscores": ("to_q/kernel", "to_out_0/kernel"),
    "linear": ("linear_q/kernel", "linear_out/kernel"),
    "leaves": ("wq", "wo"),
    "letters": ("q/w", "o/w"),
    "any": ("mixer_in/kernel", "mixer_back/kernel"),
    "proj": ("q_proj/w", "o_proj/w"),
    "query": ("query_projection/kernel", "output_projection/kernel"),
}


@pytest.mark.parametrize("scanned", [False, True], ids=["layer", "scanned"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_pairs_of_attention_kernels_are_found_by_structure(pair, scanned):
    into, out = pair
    stack = [3] * scanned
    leaves = {
        f"block/attention/{into}": {"shape": [*stack, 16, 4, 4]},
        f"block/attention/{out}": {"shape": [*stack, 4, 4, 16]},
        "block/norm/scale": {"shape": [*stack, 16]},
    }
    found = entries(tree_of(leaves))
    assert found[f"block/attention/{into}"] == go.SPLIT_HEADS_INPUT
    assert found[f"block/attention/{out}"] == go.SPLIT_HEADS_OUTPUT


def test_a_bias_that_is_named_after_its_weight_tells_the_fan_in():
    """The outer product mean of AlphaFold: a matrix of all pairs of features."""
    found = entries(tree_of({"output_w": {"shape": [8, 8, 32]}, "output_b": {"shape": [32]}}))
    assert found == {"output_b": None, "output_w": go.SPLIT_HEADS_OUTPUT}


def test_latent_attention_is_found_by_its_heads():
    """The kernels of DeepSeek's attention have different widths and share only the number of heads."""
    leaves = {
        "attn/q_a_proj/kernel": {"shape": [64, 24]},
        "attn/q_b_proj/kernel": {"shape": [24, 4, 12]},
        "attn/wkv_b/kernel": {"shape": [16, 4, 20]},
        "attn/o_proj/kernel": {"shape": [4, 8, 64]},
    }
    found = entries(tree_of(leaves))
    assert found["attn/q_a_proj/kernel"] == go.LAST_TWO
    assert found["attn/q_b_proj/kernel"] == found["attn/wkv_b/kernel"] == go.SPLIT_HEADS_INPUT
    assert found["attn/o_proj/kernel"] == go.SPLIT_HEADS_OUTPUT


@pytest.mark.parametrize("scanned", [False, True], ids=["layer", "scanned"])
@pytest.mark.parametrize(
    "names",
    [("query", "key", "value", "out"), ("q_proj", "k_proj", "v_proj", "o_proj"),
     ("to_q", "to_k", "to_v", "to_out"), ("wq", "wk", "wv", "wo"), ("into_a", "into_b", "into_c", "back")],
    ids=lambda names: names[0],
)  # fmt: skip
def test_what_a_leaf_is_does_not_depend_on_which_of_its_siblings_are_there(names, scanned):
    """`optax.partition`, `masked`, an NNX filter and freezing pass only some of the leaves to a rule."""
    stack = [3] * scanned
    shapes = {name: [*stack, 24, 4, 6] for name in names[:3]} | {names[3]: [*stack, 4, 6, 24]}
    leaves = {f"layer/attention/{name}/kernel": {"shape": shape} for name, shape in shapes.items()}
    whole = entries(tree_of(leaves))
    for path in leaves:
        alone = {path: leaves[path]}
        others = {x: leaf for x, leaf in leaves.items() if x != path}
        assert entries(tree_of(alone))[path] == whole[path]
        assert entries(tree_of(others)) == {x: whole[x] for x in others}
        hidden = {
            x: jnp.zeros(leaf["shape"]) if x == path else optax.MaskedNode() for x, leaf in leaves.items()
        }
        assert entries(hidden) == {path: whole[path]}


@pytest.mark.parametrize("module", ["layers", "blocks", "h", "stack"])
def test_a_list_of_layers_is_no_stack_of_them_whatever_its_name(module):
    """Filters and `optax.partition` hide the norms that would show that matrices have no axis of layers."""
    leaves = {
        "attn/query/kernel": ([24, 4, 6], go.SPLIT_HEADS_INPUT),
        "attn/value/kernel": ([24, 4, 6], go.SPLIT_HEADS_INPUT),
        "conv_a/kernel": ([3, 3, 16, 16], go.CONV_HWIO),
        "conv_b/weight": ([16, 16, 3, 3], go.CONV_OIHW),
        "down/kernel": ([4, 4, 8, 16], go.CONV_HWIO),
    }
    for chosen in (
        ["attn/query/kernel", "attn/value/kernel"],
        ["conv_a/kernel"],
        ["conv_b/weight"],
        ["down/kernel"],
    ):
        rows = {f"{module}/{i}/{name}": name for i in range(2) for name in chosen}
        found = entries(tree_of({path: {"shape": leaves[name][0]} for path, name in rows.items()}))
        assert found == {path: leaves[name][1] for path, name in rows.items()}


@pytest.mark.parametrize("size", [None, "d_k", "hd", "kv", "head_dim"])
@pytest.mark.parametrize("stack", [False, True], ids=["layer", "scanned"])
def test_an_axis_of_heads_makes_its_neighbour_the_size_of_a_head(size, stack):
    leaves = {
        "into": ([64, 4, 8], ["embed", "heads", size], ((0,), (1, 2))),
        "out": ([4, 8, 64], ["heads", size, "embed"], ((0, 1), (2,))),
        "grouped": ([64, 2, 4, 8], ["embed", "kv_heads", "q_per_kv", size], ((0,), (1, 2, 3))),
        "grouped_out": ([2, 4, 8, 64], ["kv_heads", "q_per_kv", size, "embed"], ((0, 1, 2), (3,))),
    }
    if size not in ("kv", "head_dim"):
        leaves["heads_first"] = ([4, 64, 8], ["heads", "embed", size], ((1,), (0, 2)))
        leaves["diagonal"] = ([4, 8, 8], ["heads", size, None], ((1,), (2,)))
    front, names = [3] * stack, ["layers"] * stack
    tree = tree_of(
        {k: {"shape": front + shape, "axes": names + axes} for k, (shape, axes, _) in leaves.items()}
    )
    for path, entry in entries(tree).items():
        shape, _, wanted = leaves[path]
        assert sides((*front, *shape), *entry) == [{i + stack for i in side} for side in wanted]


@pytest.mark.parametrize("stack", [False, True], ids=["layer", "scanned"])
@pytest.mark.parametrize(
    "names", [("q_proj", "out_proj"), ("wq", "wo"), ("into", "back")], ids=lambda x: x[0]
)
def test_grouped_queries_with_an_axis_for_the_group_are_one_matrix(names, stack):
    front = [3] * stack
    shapes = {names[0]: [64, 2, 4, 8], names[1]: [2, 4, 8, 64], "k_proj": [64, 2, 8], "v_proj": [64, 2, 8]}
    leaves = {f"block/attn/{name}/kernel": {"shape": front + shape} for name, shape in shapes.items()}
    found = entries(tree_of(leaves | {"block/norm/scale": {"shape": [*front, 64]}}))
    into, out, key, value = (found[path] for path in leaves)
    assert sides((*front, 64, 2, 4, 8), *into) == [{stack}, {1 + stack, 2 + stack, 3 + stack}]
    assert sides((*front, 2, 4, 8, 64), *out) == [{stack, 1 + stack, 2 + stack}, {3 + stack}]
    assert key == value == go.SPLIT_HEADS_INPUT


@pytest.mark.parametrize(
    ("path", "shape", "axes", "is_matrix", "kind"),
    [("moe/wi/kernel", (4, 16, 32), ("expert", "embed", "expert_mlp"), True, "matrix"),
     ("moe/wi_0", (4, 16, 32), ("exp", "embed_no_exp", "mlp"), True, "matrix"),
     ("moe/gate/kernel", (4, 16), ("exp", "embed_no_exp"), True, "router"),
     ("gates/w", (4, 16, 16), ("blocks", "block_size", "block_size_out"), True, "matrix"),
     ("mixer/kernel", (16, 32), ("embed", "depth"), True, "matrix"),
     ("mixer/kernel", (16, 32), ("embed", "block_size"), True, "matrix"),
     ("mixer/kernel", (4, 16, 32), ("decoder_layers", "embed", "group_size"), True, "matrix"),
     ("mixer/scale", (4, 16), ("num_layers", "embed"), False, "vector")],
)  # fmt: skip
def test_a_name_that_only_mentions_layers_or_experts_is_no_stack_of_them(path, shape, axes, is_matrix, kind):
    (leaf,) = readings(tree_of({path: {"shape": list(shape), "axes": list(axes)}}))
    assert (leaf.entry == go.LAST_TWO, leaf.kind) == (is_matrix, kind)


def test_heads_and_tables_with_names_of_axes_know_their_fan_in():
    leaves = {
        "lm_head/weight": ((99, 16), ("vocab", "embed"), "head", go.OUT_IN),
        "output_layer/kernel": ((16, 99), ("embed", "vocab"), "head", go.LAST_TWO),
        "token_embedder/embedding": ((99, 16), ("vocab", "embed"), "embedding", None),
    }
    rows = readings(tree_of({k: {"shape": list(x[0]), "axes": list(x[1])} for k, x in leaves.items()}))
    assert [(row.kind, row.head) for row in rows] == [(x[2], x[3]) for x in leaves.values()]


def test_as_many_layers_as_the_model_is_wide_is_warned_of_once_with_both_readings():
    leaves = {"attention/query/kernel": {"shape": [6, 6, 6]}, "attention/out/kernel": {"shape": [6, 6, 6]}}
    tx, params = go.muon(1e-3), tree_of(leaves)
    with pytest.warns(go.RoutingWarning, match="weight_dimension_numbers") as caught:
        jax.eval_shape(tx.init, params)
    assert len(caught) == 1
    for path in leaves:
        assert path in str(caught[0].message)
    assert str(go.LAST_TWO) in str(caught[0].message)
    decided = go.muon(
        1e-3, weight_dimension_numbers={"*/query/kernel": go.LAST_TWO, "*/out/kernel": go.LAST_TWO}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(decided.init, params)


def test_a_long_side_outside_of_the_layers_is_doubtful():
    """A table that no name, no kind of layer and no other table tells."""
    params = {
        "entities": jnp.zeros((9000, 4)),
        "layer_0": {"up": jnp.zeros((4, 9000))},
        "layers": {"up": jnp.zeros((2, 4, 9000))},
        "up": jnp.zeros((1200, 9000)),
    }
    with pytest.warns(go.RoutingWarning, match="entities: .* a table or a head") as caught:
        jax.eval_shape(go.muon(1e-3).init, params)
    assert "up" not in str(caught[0].message).split(". Decide")[0]


LORA = {
    "qwix input": ("q_proj/w", (16, 2), (2, 4, 4), ((0,), (1,)), ((0,), (1, 2))),
    "qwix output": ("o_proj/w", (4, 4, 2), (2, 16), ((0, 1), (2,)), ((0,), (1,))),
    "qwix einsum": ("kv_einsum/w", (16, 2), (2, 2, 4, 4), ((0,), (1,)), ((0,), (1, 2, 3))),
    "scanned": ("up/kernel", (3, 16, 2), (3, 2, 32), ((1,), (2,)), ((1,), (2,))),
    "scanned output": ("o_proj/w", (3, 4, 4, 2), (3, 2, 16), ((1, 2), (3,)), ((1,), (2,))),
    "rank 1": ("up/kernel", (16, 1), (1, 32), None, None),
    "of a head": ("lm_head/kernel", (16, 2), (2, 99), None, None),
}


@pytest.mark.parametrize("style", ["{}_lora_{}", "{}/lora/{}", "{}/lora_{}"])
@pytest.mark.parametrize(("path", "a", "b", "of_a", "of_b"), LORA.values(), ids=LORA)
def test_both_factors_of_lora_go_the_same_way(path, a, b, of_a, of_b, style):
    leaves = {style.format(path, side): {"shape": shape} for side, shape in (("a", a), ("b", b))}
    found = list(entries(tree_of(leaves)).values())
    for entry, shape, wanted in zip(found, (a, b), (of_a, of_b), strict=True):
        assert (entry and sides(shape, *entry)) == (wanted and [set(wanted[0]), set(wanted[1])])


@pytest.mark.parametrize(
    "names",
    [("lora_down", "lora_up"), ("delta_a", "delta_b"), ("A", "B"), ("into/kernel", "out_of/kernel")],
    ids=lambda names: names[0],
)  # fmt: skip
def test_the_factors_of_an_adapter_are_known_by_the_shape_of_their_kernel(names):
    """Their product has the shape of the kernel; the kernel is what it is without them."""
    shapes = {"q_proj": ([16, 4, 6], [16, 3], [3, 4, 6]), "o_proj": ([4, 6, 16], [4, 6, 3], [3, 16])}
    leaves = {}
    for module, (kernel, a, b) in shapes.items():
        of = {"kernel": kernel, names[0]: a, names[1]: b}
        leaves |= {f"attn/{module}/{name}": {"shape": shape} for name, shape in of.items()}
    found = entries(tree_of(leaves))
    wanted = {
        "q_proj": (go.SPLIT_HEADS_INPUT, ((0,), (1,)), ((0,), (1, 2))),
        "o_proj": (go.SPLIT_HEADS_OUTPUT, ((0, 1), (2,)), ((0,), (1,))),
    }
    for module, (of_kernel, of_a, of_b) in wanted.items():
        assert found[f"attn/{module}/kernel"] == of_kernel
        for name, axes in zip(names, (of_a, of_b), strict=True):
            path = f"attn/{module}/{name}"
            assert sides(leaves[path]["shape"], *found[path]) == [set(side) for side in axes]


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="first")(x)
        x = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, name="depthwise_conv")(x)
        x = nn.Conv(12, (1, 1), name="pointwise_conv")(x)
        return nn.Conv(6, (5, 5), use_bias=False, name="unnamed")(x)


def test_convolutions_of_linen_are_matrices_from_window_and_channels():
    params = jax.eval_shape(Convolutions().init, jax.random.key(0), jnp.zeros((1, 8, 8, 4)))["params"]
    found = entries(params)
    assert found["first/kernel"] == found["unnamed/kernel"] == go.CONV_HWIO
    assert sides((1, 1, 8, 12), *found["pointwise_conv/kernel"]) == [{2}, {3}]
    assert found["depthwise_conv/kernel"] is None


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_equinox_and_pytorch_have_their_channels_first(dims):
    kind = {1: eqx.nn.Conv1d, 2: eqx.nn.Conv2d, 3: eqx.nn.Conv3d}[dims]
    model = {"a": kind(4, 8, 3, key=jax.random.key(0)), "b": kind(8, 8, 3, groups=8, key=jax.random.key(0))}
    found = entries(eqx.filter(model, eqx.is_inexact_array))
    axes = tuple(range(-1 - dims, 0))
    assert found["a/weight"] == Dims(axes, -2 - dims)
    assert found["b/weight"] is None
    assert found["a/bias"] is None
    # PyTorch's names in a plain dict.
    plain = entries(tree_of({"conv_a/weight": {"shape": [8, 4] + [3] * dims}, "conv_a/bias": {"shape": [8]}}))
    assert plain["conv_a/weight"] == Dims(axes, -2 - dims)


class OwnLinear(eqx.nn.Linear):
    """A layer class that a model defines."""


def test_layers_of_equinox_tell_fan_in_from_fan_out():
    keys = jax.random.split(jax.random.key(0), 4)
    model = {
        "mlp": eqx.nn.MLP(4, 4, 8, 2, key=keys[0]),
        "attention": eqx.nn.MultiheadAttention(2, 8, key=keys[1]),
        "table": eqx.nn.Embedding(11, 4, key=keys[2]),
        "norm": eqx.nn.LayerNorm((3, 5)),
        "stack": eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 8, key=key))(keys),
        "derived": OwnLinear(4, 8, key=keys[3]),
    }
    found = {path: x for path, x in entries(eqx.filter(model, eqx.is_inexact_array)).items() if x}
    assert set(found.values()) == {go.OUT_IN}
    assert len(found) == 3 + 4 + 1 + 1


@pytest.mark.parametrize(
    ("path", "shape"),
    [("layers/attn/sinks", (3, 4)), ("layers/mixer/A_log", (3, 4)), ("layers/mlp/per_expert_scale", (3, 4)),
     ("layers/layer_scale1/lambda1", (3, 16)), ("layers/attn/qkv/bias", (3, 48)),
     ("register_tokens", (1, 4, 16)), ("cls_token", (1, 1, 16)),
     ("mask_token", (1, 16)), ("latents", (8, 16)), ("pos_embedding", (1, 9, 16)),
     ("layers/gate/kernel", (3, 16, 1)), ("out/kernel", (16, 1)), ("layers/anything", (3, 16)),
     ("layers/attention_norm/kernel", (3, 16)), ("layers/ln/w", (3, 16)), ("layers/norm1/weight", (3, 16)),
     ("layers/post_mlp_norm/weight", (3, 16)), ("layers/mlp/up_norm/kernel", (3, 16)),
     ("conv_1d/w", (4, 64)), ("temporal/conv_kernel", (4, 64)), ("conv1d/weight", (64, 4)),
     ("ssm/log_A", (16, 32)),
     ("ssm/log_A_real", (16, 32)), ("ssm/A_imag", (16, 32)), ("moe/b1", (4, 32)),
     ("reader/codebook", (16, 32)),
     ("quantizer/codebooks", (2, 16, 32)), ("codevectors", (16, 32)), ("W_E", (97, 16)), ("W_U", (16, 97)),
     ("W_pos", (9, 16)), ("attn/rel_pos_w", (9, 16)), ("shared", (97, 16)), ("shared/weight", (97, 16)),
     ("lookup/w", (97, 16)),
     ("tok_table/w", (97, 16))],
)  # fmt: skip
def test_vectors_of_a_stack_tokens_and_what_has_a_side_of_one_are_no_matrices(path, shape):
    rest = {
        "layers/mlp/up/kernel": {"shape": [3, 16, 32]},
        "layers/norm/scale": {"shape": [3, 16]},
        "embed/embedding": {"shape": [99, 16]},
    }
    found = entries(tree_of({path: {"shape": list(shape)}} | rest))
    assert found[path] is None
    assert found["layers/mlp/up/kernel"] == go.LAST_TWO


@pytest.mark.parametrize(
    ("path", "shape", "is_matrix"),
    [("logitdense/kernel", (16, 99), False), ("output/kernel", (16, 99), False),
     ("transformer.lm_head.weights", (16, 99), False), ("decoder/project/kernel", (16, 99), False),
     ("embedder/mlp/up/kernel", (16, 32), True), ("classifier/block_0/Dense_0/kernel", (16, 32), True),
     ("MAPHead_0/MlpBlock_0/Dense_0/kernel", (16, 32), True), ("time_emb_proj/kernel", (16, 32), True),
     ("pre_logits/kernel", (16, 16), True), ("attention/output/dense/kernel", (16, 16), True),
     ("lm_heads/0/kernel", (16, 98), False), ("lm_heads/1/kernel", (16, 98), False),
     ("heads_0/kernel", (16, 5), False),
     ("output_heads/policy/kernel", (16, 5), False), ("classifiers/0/kernel", (16, 5), False),
     ("attn/heads/0/query/kernel", (16, 8), True), ("num_heads_proj/kernel", (16, 8), True),
     ("adaLN_modulation/kernel", (16, 96), True), ("ada_norm/kernel", (16, 32), True),
     ("norm_proj/kernel", (16, 32), True),
     ("cond_ln/w", (16, 32), True), ("adaLN_modulation/1/weight", (96, 16), True),
     ("adaLN_modulation/weight", (96, 16), True),
     ("mixer/w_latent", (16, 32), True), ("attn/kv_latent_down", (16, 4), True),
     ("latent_proj", (16, 32), True),
     ("pos_proj", (16, 16), True), ("token_mixer", (16, 16), True),
     ("block/emb_layers/1/kernel", (64, 32), True),
     ("encoder/embedding_hidden_mapping_in/kernel", (16, 64), True), ("ssm/B", (16, 32), True),
     ("ssm/C", (32, 16), True),
     ("embed_in/weight", (98, 16), False), ("conv_proj/kernel", (4, 64), True)],
)  # fmt: skip
def test_tables_and_heads_are_what_they_are_and_not_all_that_is_called_so(path, shape, is_matrix):
    """The name of a module does not decide for all leaves of a network."""
    rest = {
        "embedder/token/embedding": {"shape": [99, 16]},
        "embedder/mlp/down/kernel": {"shape": [32, 16]},
        "classifier/block_0/Dense_1/kernel": {"shape": [32, 16]},
        "MAPHead_0/MlpBlock_0/Dense_1/kernel": {"shape": [32, 16]},
    }
    found = entries(tree_of({path: {"shape": list(shape)}} | rest))
    assert (found[path.replace(".", "/")] if path not in found else found[path] is not None) == is_matrix


def test_the_last_dense_of_a_compact_linen_model_is_its_head():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (8, 12):
                x = nn.relu(nn.Dense(width)(x))
            return nn.Dense(3)(x)

    found = entries(jax.eval_shape(Network().init, jax.random.key(0), jnp.zeros((1, 5)))["params"])
    assert {path for path, entry in found.items() if entry} == {"Dense_0/kernel", "Dense_1/kernel"}


def test_a_dense_whose_output_another_layer_reads_is_no_head():
    """The network of a diffusion model's times has the last `Dense_n` at the root; CNNs end with one."""
    times = {"Dense_0/kernel": {"shape": [16, 64]}, "Dense_1/kernel": {"shape": [64, 64]}}
    blocks = {"Block_0/Dense_0/kernel": {"shape": [64, 16]}, "Conv_0/kernel": {"shape": [3, 3, 3, 16]}}
    assert entries(tree_of(times | blocks))["Dense_1/kernel"] == go.LAST_TWO
    cnn = {"Dense_0/kernel": {"shape": [64, 32]}, "Dense_1/kernel": {"shape": [32, 10]}}
    assert entries(tree_of(cnn | {"Conv_0/kernel": {"shape": [3, 3, 3, 16]}}))["Dense_1/kernel"] is None


def test_routers_are_matrices_and_one_argument_changes_that():
    leaves = {
        "moe/router/kernel": {"shape": [16, 4]},
        "moe/gate/kernel": {"shape": [16, 4]},
        "mlp/gate_proj/kernel": {"shape": [16, 32]},
        "moe/experts/up": {"shape": [4, 16, 32]},
        # Levanter's Qwen: only the axis names tell.
        "mlp/gate/weight": {"shape": [2, 4, 16], "axes": ["layers", "experts", "embed"]},
        "mlp/up/weight": {"shape": [2, 4, 16, 32], "axes": ["layers", "experts", "embed", "mlp"]},
    }
    params = tree_of(leaves)
    assert all(entries(params).values())
    found = entries(params, functools.partial(go.hidden_matrices, routers=False))
    assert {path for path, entry in found.items() if entry is None} == {
        "moe/router/kernel",
        "moe/gate/kernel",
        "mlp/gate/weight",
    }


def test_a_mapping_from_patterns_decides_first_match_first_and_leaves_the_rest_to_the_policy():
    leaves = {
        "layers/up/kernel": {"shape": [16, 3, 32]},
        "layers/down/kernel": {"shape": [32, 3, 16]},
        "gate/kernel": {"shape": [16, 4]},
        "embed/embedding": {"shape": [99, 16]},
    }
    spec = {"layers/up/*": Dims(0, 2), "layers/*": Dims(0, -1), "*/embedding": go.LAST_TWO, "gate/*": None}
    found = entries(tree_of(leaves), spec)
    assert found == {
        "layers/up/kernel": Dims(0, 2),
        "layers/down/kernel": Dims(0, -1),
        "gate/kernel": None,
        "embed/embedding": go.LAST_TWO,
    }
    some = entries(tree_of(leaves), {"layers/*": Dims(0, -1)})
    assert some["gate/kernel"] == go.LAST_TWO
    assert some["embed/embedding"] is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [({"*/up/kernel": "matrix"}, "role 'matrix'"), ([("*/up/kernel", go.LAST_TWO)], "mapping")],
)
def test_a_pattern_without_a_role_is_refused_at_construction(spec, message):
    with pytest.raises(TypeError, match=message):
        go.muon(1e-3, weight_dimension_numbers=spec)


def test_a_list_is_a_tree_of_roles_unless_it_holds_patterns():
    tx = go.muon(1e-3, weight_dimension_numbers=[(), go.OUT_IN])
    found = go.describe(tx, [(), jnp.ones((4, 6))]).leaves
    assert [leaf.reason for leaf in found if leaf.kind == "matrix"] == ["your dimension numbers"]


def test_a_pattern_that_decides_no_leaf_is_warned_of():
    params = tree_of({"layers/up/kernel": {"shape": [16, 32]}})
    tx = go.muon(1e-3, weight_dimension_numbers={"*": None, "layer/*": go.LAST_TWO})
    with pytest.warns(go.RoutingWarning, match=r"\['layer/\*'\].*'layers/up/kernel'"):
        jax.eval_shape(tx.init, params)
    assert "layer/*" in go.describe(tx, params).notes[0]


def test_the_cost_of_the_policy_grows_as_the_leaves_do():
    """No rule visits all leaves for each leaf: tracing an update of a thousand leaves is quick."""

    def calls(layers):
        leaves = {}
        for i in range(layers):
            at = f"layers_{i}"
            leaves |= {f"{at}/attn/{n}/kernel": {"shape": [64, 4, 16]} for n in "qkv"}
            leaves |= {f"{at}/attn/{n}/kernel_lora_{x}": {"shape": [64, 4]} for n in "qk" for x in "ab"}
            leaves |= {f"{at}/attn/o/kernel": {"shape": [4, 16, 64]}, f"{at}/norm/scale": {"shape": [64]}}
            leaves |= {f"{at}/mlp/{n}/kernel": {"shape": [64, 64]} for n in ("up", "down", "gate")}
        params = tree_of(leaves | {"embed/embedding": {"shape": [999, 64]}})
        seen = []
        sys.setprofile(lambda *event: seen.append(1))
        try:
            go.hidden_matrices(params)
        finally:
            sys.setprofile(None)
        return len(seen)

    assert calls(40) < 2.5 * calls(20)


def test_a_step_of_a_convolution_is_orthogonal_as_the_matrix_that_it_is():
    g = {"conv": {"kernel": np.float32(np.random.default_rng(0).normal(size=(3, 3, 4, 8)))}}
    updates, _ = run(go.muon(1.0, momentum=0.0, orthogonalizer=go.polar), [g])
    matrix = np.reshape(updates[0]["conv"]["kernel"], (36, 8)) / (-0.2 * 6)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(8), atol=1e-4)
