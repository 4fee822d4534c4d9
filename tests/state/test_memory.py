"""The memory report equals the allocated memory."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import gum_optax as go
from gum_optax import report

from helpers import OPTIMIZERS, sequential_steps


def params():
    layers = {str(i): {"kernel": jnp.ones((4, 7)), "bias": jnp.ones(7, jnp.bfloat16)} for i in range(3)}
    return {"layers": layers, "embed": {"embedding": jnp.ones((9, 4))}, "frozen": None}


def allocated(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


ANY = {name: make(0.1, **arguments) for name, (make, arguments) in OPTIMIZERS.items()}
ANY |= {
    "adamw": optax.adamw(0.1),
    "optax_muon": optax.contrib.muon(0.1),
    "multi_steps": optax.MultiSteps(go.gum(0.1, rank=2), 2).gradient_transformation(),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), go.gum(0.1, rank=2)),
}


@pytest.mark.parametrize("tx", ANY.values(), ids=ANY)
def test_the_report_adds_up_to_what_init_allocates(tx):
    found = go.memory_report(tx, params())
    assert found.parameters == found.gradients == allocated(params())
    assert sum(found.state.values()) == allocated(tx.init(params()))
    assert found.total == found.parameters + found.gradients + sum(found.state.values())


def test_each_leaf_has_its_own_state_by_optax_names_and_slots_are_nobodys():
    found = {
        leaf.name: leaf
        for leaf in go.memory_report(go.gum(0.1, rank=2, full_rank_fraction=0.3), params()).leaves
    }
    kernel = found["layers/1/kernel"]
    assert kernel.shape == (4, 7)
    assert kernel.state == {"projectors": 4 * 4 * 2, "trace": 4 * 2 * 7}
    # The auxiliary AdamW is float32 for every dtype of the model.
    assert found["layers/1/bias"] == go.LeafMemory(
        "layers/1/bias", (7,), 2 * 7, 2 * 7, {"mu": 4 * 7, "nu": 4 * 7}
    )
    assert found["slots"].state == {"slots": 4 * 4 * 7}


def test_gradients_may_have_a_dtype_of_their_own():
    found = go.memory_report(optax.sgd(0.1), {"w": jnp.ones((3, 5))}, gradient_dtype=jnp.bfloat16)
    assert (found.parameters, found.gradients) == (60, 30)


def test_the_temporaries_are_those_of_the_compiled_step():
    shapes = {"w": jax.ShapeDtypeStruct((64, 96), jnp.float32)}
    sgd, muon = (go.memory_report(tx, shapes, compiled=True) for tx in (optax.sgd(0.1), go.muon(0.1)))
    assert sgd.temporaries is not None
    assert muon.temporaries is not None
    assert sgd.temporaries < 64 * 96 * 4 <= muon.temporaries  # Newton-Schulz holds at least one matrix
    assert muon.total == muon.parameters + muon.gradients + sum(muon.state.values()) + muon.temporaries
    assert go.memory_report(go.muon(0.1), shapes).temporaries is None


def test_the_temporaries_are_those_of_a_step_that_computes_its_gradients():
    params = {name: jax.ShapeDtypeStruct((64, 96), jnp.float32) for name in "abc"}
    tx = go.as_matrices(go.low_rank(optax.trace(0.9), 8, 2))

    def loss(params, x):
        return sum(jnp.sum(jnp.square(x @ p)) for p in params.values())

    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    arguments = params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((4, 64), jnp.float32)
    whole = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile().memory_analysis()
    found = go.memory_report(tx, params, compiled=True)
    assert found.temporaries == pytest.approx(whole.temp_size_in_bytes - found.gradients, rel=0.02)


@sequential_steps
def test_gradients_that_are_kept_leave_the_step_no_room():
    shapes = {name: jax.ShapeDtypeStruct((8, 64, 96), jnp.float32) for name in "ab"}
    within, kept = (
        go.memory_report(go.muon(0.1), shapes, compiled=True, keep_gradients=keep).temporaries
        for keep in (False, True)
    )
    assert within + 8 * 64 * 96 * 4 <= kept


def test_what_is_donated_costs_no_temporaries():
    """Moments have the parameters' shape: in another order, JAX would swap their buffers and copy."""
    shapes = {"w": jax.ShapeDtypeStruct((64, 96), jnp.float32)}
    assert go.memory_report(optax.adamw(0.1), shapes, compiled=True).temporaries < 64 * 96


def test_a_flax_nnx_state_and_a_single_array_are_trees():
    model = nnx.Linear(4, 7, rngs=nnx.Rngs(0))
    found = go.memory_report(optax.adam(0.1), nnx.state(model, nnx.Param))
    assert {leaf.name: sum(leaf.state.values()) for leaf in found.leaves if leaf.parameters} == {
        "kernel": 2 * 4 * 28, "bias": 2 * 4 * 7,
    }  # fmt: skip
    alone = go.memory_report(optax.trace(0.9), jnp.ones((3, 5)))
    assert alone.leaves[0].state == {"trace": 60}


def test_the_table_names_leaves_kinds_and_totals():
    text = str(go.memory_report(go.gum(0.1, rank=2, full_rank_fraction=0.3), params()))
    assert "layers/2/kernel" in text
    assert "4×7" in text
    assert "projectors" in text.splitlines()[0]
    assert "temporaries not compiled" in text.splitlines()[-1]


def test_a_report_needs_an_optimizer():
    with pytest.raises(TypeError, match=r"tx must be an optax\.GradientTransformation"):
        go.memory_report("gum", params())


@pytest.mark.parametrize(
    ("model", "billions"), [("llama-3-8b", 8.03), ("qwen-2.5-7b", 7.62), ("gemma-2-9b", 9.24)]
)
def test_the_shapes_are_those_of_the_published_models(model, billions):
    tree = report.shapes(report.MODELS[model], jnp.bfloat16)
    assert sum(x.size for x in jax.tree.leaves(tree)) / 1e9 == pytest.approx(billions, abs=0.005)


def test_the_largest_rank_fits_and_the_next_does_not():
    tree = report.shapes(report.MODELS["llama-3-8b"], jnp.bfloat16)

    def needed(rank):
        return go.memory_report(go.galore_muon(1.0, rank), tree).total

    rank = report.largest_rank(tree, needed(192) + 1, lambda rank: go.galore_muon(1.0, rank))
    assert rank == 192
    assert needed(rank) <= needed(192) + 1 < needed(rank + 64)
    assert report.largest_rank(tree, 1, lambda rank: go.galore_muon(1.0, rank)) is None


def test_the_largest_rank_is_that_of_a_linear_search():
    stacks = (40, 192, 192), (2, 448, 448)
    tree = {"layers": [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in stacks]}

    def needed(rank):
        return go.memory_report(go.galore_muon(1.0, rank), tree).total

    ranks = range(64, 448, 64)
    totals = {rank: needed(rank) for rank in ranks}
    assert sorted(totals.values()) != [*totals.values()]  # at rank 192 one stack is no longer projected
    for budget in totals.values():
        expected = max(rank for rank in ranks if totals[rank] <= budget)
        assert report.largest_rank(tree, budget, lambda rank: go.galore_muon(1.0, rank)) == expected


def test_the_help_of_the_program_says_how_to_report_a_model_of_ones_own(capsys):
    with pytest.raises(SystemExit):
        report.main(["--help"])
    assert "gum_optax.memory_report(tx, params)" in " ".join(capsys.readouterr().out.split())


def test_the_program_prints_a_table_for_a_model(capsys):
    report.main(["--model", "llama-3-8b", "--rank", "128", "--budget", "42"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.startswith("  ")}
    assert {"adamw", "muon", "galore", "galore_muon", "gum"} <= set(rows)
    assert float(rows["gum"][1]) == pytest.approx(10.7, abs=0.1)
    assert any("largest rank within 42 GiB" in line for line in lines)
