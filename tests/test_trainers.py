"""Real runs in other trainers, each in its own environment: `nox -s trainers`."""

import ast
import importlib.util
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import OPTIMIZERS

SCRIPTS = Path(__file__).resolve().parent.parent / "examples" / "trainers"
STEPS = 6

pytestmark = pytest.mark.trainers


@pytest.fixture(scope="module", params=["tunix", "kauldron", "maxtext", "levanter"])
def trainer(request):
    if importlib.util.find_spec(request.param) is None and os.environ.get("TRAINER") != request.param:
        pytest.skip(f"needs {request.param}: nox -s 'trainers({request.param})'")
    return request.param


def train(trainer, out, steps=STEPS, devices=1):
    """The output of a script."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    script = SCRIPTS / f"with_{trainer}.py"
    command = [sys.executable, str(script), "--steps", str(steps), "--out", str(out)]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def records(out):
    """Steps and losses in the order of the records."""
    lines = map(json.loads, (out / "losses.jsonl").read_text().splitlines())
    return [(int(line["step"]), line.get("loss", line.get("learning/loss"))) for line in lines]


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """The output and losses of an uninterrupted run."""
    out = tmp_path_factory.mktemp(trainer) / "whole"
    return train(trainer, out), records(out)


# A kernel of one layer or of two scanned layers, 16 × 32: shapes of projector and momentum at rank 4.
KERNEL = {
    "tunix": ("gate_proj", ()),
    "kauldron": ("up", ()),
    "maxtext": ("wi_0", (2,)),
    "levanter": ("gate_proj", (2,)),
}


def arrays(printed):
    """The shape of every array in the output of `report`, and whether it is sharded, by path."""
    found = re.findall(r"^(\S.*) (\(.*\)) (sharded|replicated)$", printed, re.MULTILINE)
    return {path: (ast.literal_eval(shape), where == "sharded") for path, shape, where in found}


def test_gum_sees_the_matrices_of_the_model_and_the_loss_falls(trainer, whole):
    printed, found = whole
    assert {"devices 1", "refreshes 2"} <= set(printed.splitlines())
    name, layers = KERNEL[trainer]
    shapes = {path: shape for path, (shape, _) in arrays(printed).items()}
    kernels = {path: shape for path, shape in shapes.items() if name in path}
    assert {shape for path, shape in kernels.items() if "projectors" in path} == {(*layers, 16, 4)}
    assert {shape for path, shape in kernels.items() if "trace" in path} == {(*layers, 4, 32)}
    assert any("slots" in path for path in shapes)
    losses = [loss for _, loss in found]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])


# Every linear layer except the head.
PROJECTED = {
    "tunix": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "kauldron": {"query", "key", "value", "out", "up", "down"},
    "maxtext": {"query", "key", "value", "out", "wi_0", "wi_1", "wo"},
    "levanter": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}


def test_every_linear_layer_is_projected_by_default_and_nothing_else(trainer, whole):
    names = [re.findall(r"\w+", path) for path in arrays(whole[0]) if "projectors" in path]
    leaf = {"kernel", "weight", "w"}
    found = [next(name for name, child in itertools.pairwise(path) if child in leaf) for path in names]
    assert set(found) == PROJECTED[trainer]
    layers = 2 if trainer == "tunix" else 1  # the other trainers scan their layers, or have one layer
    assert len(found) == layers * len(PROJECTED[trainer])


def stopped_and_resumed(trainer, out, devices):
    """The records and output of a run with one interruption; checks the start of its second part."""
    train(trainer, out, steps=STEPS // 2, devices=devices)
    first = records(out)
    printed = train(trainer, out, devices=devices)
    second = records(out)[len(first) :]
    # Kauldron repeats the step at which it stopped, with the same result.
    again = second[0][0] == first[-1][0]
    assert second[0][0] == first[-1][0] + (not again)
    assert not again or second[0] == first[-1]
    return first + second[again:], printed


def test_a_run_that_was_stopped_goes_on_to_the_bit(trainer, whole, tmp_path):
    found, printed = stopped_and_resumed(trainer, tmp_path, devices=1)
    assert found == whole[1]
    assert arrays(printed) == arrays(whole[0])


def test_sharded_over_four_devices_and_resumed_it_is_the_same_run(trainer, whole, tmp_path):
    found, printed = stopped_and_resumed(trainer, tmp_path, devices=4)
    np.testing.assert_allclose(found, whole[1], rtol=1e-5)
    assert {"devices 4", "refreshes 2"} <= set(printed.splitlines())
    here, there = ({path: x[0] for path, x in arrays(text).items()} for text in (printed, whole[0]))
    assert here == there
    for kind in ("projectors", "slots"):
        assert any(is_sharded for path, (_, is_sharded) in arrays(printed).items() if kind in path), kind


# Fields of small Levanter models, by the module and name of their configuration.
LEVANTER_MODELS = {
    ("gpt2", "Gpt2Config"): {},
    ("llama", "LlamaConfig"): {"intermediate_dim": 32, "num_kv_heads": 2},
    ("mixtral", "MixtralConfig"): {
        "intermediate_dim": 32, "num_kv_heads": 2, "n_routed_experts": 3, "num_experts_per_tok": 2
    },
    ("qwen3_moe", "Qwen3MoeConfig"): {"intermediate_dim": 32, "num_kv_heads": 2},
}  # fmt: skip


def levanter(module="mixtral", name="MixtralConfig"):
    """The glue, and the abstract parameters of a small Levanter model."""
    pytest.importorskip("levanter")
    glue = importlib.import_module("gum_optax.trainers.levanter")
    import equinox as eqx
    import haliax as hax

    fields = {"max_seq_len": 8, "hidden_dim": 16, "num_layers": 2, "num_heads": 4}
    make = getattr(importlib.import_module(f"levanter.models.{module}"), name)
    config = make(**fields, **LEVANTER_MODELS[module, name])
    model = eqx.filter_eval_shape(lambda: config.build(hax.Axis("vocab", 64), key=jax.random.PRNGKey(0)))
    return glue, eqx.filter(model, lambda x: hasattr(x, "shape"))


def test_levanter_builds_every_optimizer_of_the_library_as_a_call_of_it_would():
    glue, params = levanter()
    from levanter.optim.config import OptimizerConfig

    classes = OptimizerConfig.get_known_choices()
    for name in OPTIMIZERS:
        config = classes.get(f"gum_optax_{name}", classes.get(name))
        assert config.__module__ == glue.__name__
        rank = {"rank": 4} if "rank" in inspect.signature(getattr(go, name)).parameters else {}
        built = config(weight_decay=0.0, max_grad_norm=None, **rank).build(10)
        called = getattr(go, name)(lambda _: 0.0, **rank)
        ours, theirs = (jax.eval_shape(tx.init, params) for tx in (built, called))
        assert jax.tree.structure(ours) == jax.tree.structure(theirs), name
        assert [x.shape for x in jax.tree.leaves(ours)] == [x.shape for x in jax.tree.leaves(theirs)], name


def test_levanter_reads_a_configuration_by_name_with_the_numbers_of_the_signature():
    glue, _ = levanter()
    draccus = pytest.importorskip("draccus")
    from levanter.optim.config import OptimizerConfig

    asked = {"type": "gum", "rank": 8, "full_rank_fraction": 0.25, "momentum_dtype": "bfloat16"}
    config = draccus.decode(OptimizerConfig, asked)
    assert config == glue.GumConfig(rank=8, full_rank_fraction=0.25, momentum_dtype="bfloat16")


def test_levanter_experts_attention_and_routers_are_matrices_by_their_own_in_and_out():
    _, params = levanter()
    numbers = go.hidden_matrices(params)
    is_numbers = lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers)  # noqa: E731
    found = jax.tree_util.tree_leaves_with_path(numbers, is_leaf=is_numbers)
    names = lambda path: tuple(re.findall(r"\.(\w+)", jax.tree_util.keystr(path))[-3:-1])  # noqa: E731
    sides = {names(path): tuple(dims) for path, dims in found}
    assert sides == {
        ("self_attn", "q_proj"): (-1, (-4, -3, -2)),  # (layers, kv_head, q_heads_per_group, head_size, embed)
        ("self_attn", "k_proj"): (-1, (-3, -2)),
        ("self_attn", "v_proj"): (-1, (-3, -2)),
        ("self_attn", "o_proj"): ((-2, -1), -3),
        ("block_sparse_moe", "gate"): (-1, -2),
        ("experts", "w1"): (-2, -1),  # (layers, experts, embed, mlp)
        ("experts", "w2"): (-2, -1),
        ("experts", "w3"): (-2, -1),
    }


@pytest.mark.parametrize("config", LEVANTER_MODELS, ids=lambda config: config[0])
def test_the_matrices_of_a_levanter_model_are_its_linear_layers_but_the_head(config):
    """`In` and `Out` of each layer decide, all other axes are stacks; also if all other leaves are masked."""
    _, params = levanter(*config)
    import haliax as hax

    is_linear = lambda x: isinstance(x, hax.nn.Linear | hax.nn.MoELinear)  # noqa: E731
    wanted = {}
    for path, layer in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_linear):
        if is_linear(layer) and "lm_head" not in jax.tree_util.keystr(path):
            names = [axis.name for axis in layer.weight.axes]
            fans = (hax.axis.ensure_tuple(fan) for fan in (layer.In, layer.Out))
            wanted[id(layer.weight.array)] = tuple({names.index(axis.name) for axis in fan} for fan in fans)
    assert len(wanted) >= 4

    def found(tree):
        entries = jax.tree.structure(tree).flatten_up_to(go.hidden_matrices(tree))
        pairs = zip(jax.tree.leaves(tree), entries, strict=True)
        return {id(x): tuple(map(set, axes_of(entry, x.ndim))) for x, entry in pairs if entry is not None}

    assert found(params) == wanted
    masked = jax.tree.map(lambda x: x if id(x) in wanted else optax.MaskedNode(), params)
    assert found(masked) == wanted


def axes_of(entry, ndim):
    """The reduction axes and output axes, counted from the front."""
    return [[axis % ndim for axis in (axes if isinstance(axes, tuple) else (axes,))] for axes in entry]


def test_a_convolution_of_levanter_takes_its_whole_window_as_fan_in():
    levanter()
    import haliax as hax

    In, Out = hax.Axis("in", 4), hax.Axis("out", 8)
    make = lambda **kwargs: hax.nn.Conv.init(("x", "y"), In, Out, 3, key=jax.random.PRNGKey(0), **kwargs)  # noqa: E731
    found = go.hidden_matrices({"a": make(), "b": make(groups=4)})
    assert found["a"].weight.array == optax.contrib.MuonDimensionNumbers((-3, -2, -1), -4)
    assert found["a"].bias.array is found["b"].weight.array is None


@pytest.mark.parametrize("name", ["gum", "galore_muon", "muon"])
def test_the_parts_of_a_levanter_weight_train_and_are_saved_as_three_weights_would_be(name, tmp_path):
    levanter()
    import equinox as eqx
    import haliax as hax

    Embed, Out, Flat = hax.Axis("embed", 16), hax.Axis("out", 12), hax.Axis("flat", 36)
    make = lambda axis, seed: hax.nn.Linear.init(  # noqa: E731
        Embed, axis, key=jax.random.PRNGKey(seed), use_bias=False
    )
    # In the order of the tree's leaves, so that both draw the same first subspaces.
    three, fused = {x: make(Out, seed) for seed, x in enumerate("kqv")}, {"kqv": make(Flat, 3)}

    def fuse(tree):
        whole = jnp.concatenate([tree[x].weight.array for x in "kqv"])
        return jax.tree.map(lambda _: whole, fused)

    rank = {} if name == "muon" else {"rank": 4}
    parts = go.Parts((12, 12, 12), axis=0, numbers=go.OUT_IN)
    whole = getattr(go, name)(0.1, **rank, weight_dimension_numbers={"*/weight": parts})
    apart = getattr(go, name)(0.1, **rank)
    state, wanted_state = whole.init(fuse(three)), apart.init(three)
    structure = jax.tree.structure(state)
    step, wanted_step = jax.jit(whole.update), jax.jit(apart.update)
    for shift in (0.0, 1.0, 2.0):
        gradients = jax.tree.map(lambda x, shift=shift: jnp.sin(9 * x + shift), three)
        updates, state = step(fuse(gradients), state, fuse(three))
        wanted, wanted_state = wanted_step(gradients, wanted_state, three)
        np.testing.assert_allclose(updates["kqv"].weight.array, fuse(wanted)["kqv"].weight.array, atol=1e-6)
        assert jax.tree.structure(state) == structure
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    again = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", jax.tree.map(jnp.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_levanter_decays_what_its_own_optimizers_decay():
    glue, shapes = levanter()
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    tx = glue.GumConfig(rank=4, learning_rate=0.5, weight_decay=0.1, lr_schedule="constant", warmup=0).build(
        9
    )
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        kept = "norm" in name or "embeddings" in name
        np.testing.assert_allclose(update, 0.0 if kept else -0.05, rtol=1e-6, err_msg=name)


@pytest.fixture
def installed(monkeypatch):
    """MaxText's module of optimizers after `install` of a function that returns its arguments."""
    from gum_optax.trainers import maxtext

    optimizers = pytest.importorskip("maxtext.optimizers.optimizers")
    monkeypatch.setattr(optimizers, "get_optimizer", optimizers.get_optimizer)
    maxtext.install(lambda rate, **arguments: (rate, arguments), rank=4)
    return optimizers


def test_maxtext_asks_the_installed_optimizer_with_its_own_schedule_and_decay(installed):
    config = types.SimpleNamespace(adam_weight_decay=0.1, adamw_mask=["scale"])
    rate, arguments = installed.get_optimizer(config, 0.5)
    mask = arguments["weight_decay_mask"]({"scale": 0, "kernel": 0})
    assert (rate, arguments["rank"], arguments["weight_decay"]) == (0.5, 4, 0.1)
    assert mask == {"scale": False, "kernel": True}


@pytest.mark.parametrize("asked", [{"skip_step_on_spikes": True}, {"trainable_parameters_mask": ["mlp"]}])
def test_maxtext_settings_that_only_its_own_optimizers_know_are_refused(installed, asked):
    config = types.SimpleNamespace(adam_weight_decay=0.1, adamw_mask=None, **asked)
    with pytest.raises(ValueError, match=next(iter(asked))):
        installed.get_optimizer(config, 0.5)
