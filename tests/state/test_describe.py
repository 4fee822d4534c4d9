"""A user can see how the optimizer treats each leaf, and what deserves attention."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import gum_optax as go


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def model(layers=3, width=16):
    block = {
        "attention": {"to_q": {"kernel": shape(width, 4, 4)}, "to_out": {"kernel": shape(4, 4, width)}},
        "up": {"kernel": shape(width, 2 * width)},
        "norm": {"scale": shape(width)},
    }
    return {
        "embed": {"embedding": shape(99, width)},
        "layers": [block] * layers,
        "odd": {"kernel": shape(12, 20)},
    }


def by_axes(x):
    return "a" if x.ndim > 1 else "b"


def rows(tx, params):
    return {row.name: row for row in go.describe(tx, params).leaves}


def test_a_row_says_what_a_leaf_is_why_and_what_it_costs():
    tx, params = go.gum(1e-3, rank=4, full_rank_fraction=0.3), model()
    found = rows(tx, params)
    query = found["layers/1/attention/to_q/kernel"]
    assert query[:7] == (query.name, (16, 4, 4), "matrix", "1 of 16 × 16", 4, "2 of 6", "attention pair")
    assert found["embed/embedding"].kind == "embedding"
    assert found["embed/embedding"].rank is None
    assert found["layers/0/up/kernel"].slots == "1 of 3"
    assert found["layers/0/norm/scale"].blocks == ""
    report = go.memory_report(tx, params)
    assert sum(row.state for row in found.values()) == sum(report.state.values())
    assert {row.name: row.state for row in found.values()} == {
        leaf.name: sum(leaf.state.values()) for leaf in report.leaves
    }


def test_equal_leaves_are_one_row_of_the_table():
    lines = str(go.describe(go.gum(1e-3, rank=4), model())).splitlines()
    (line,) = [line for line in lines if "to_q" in line]
    assert "layers/*/attention/to_q/kernel" in line
    assert "3 × 16×4×4" in line
    assert "attention pair" in line
    assert "10 of 14 leaves are matrices" in "\n".join(lines)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.partition({"a": tx, "b": optax.sgd(1.0)}, lambda p: jax.tree.map(by_axes, p)),
    ],
    ids=["chain", "MultiSteps", "apply_if_finite", "partition"],
)  # fmt: skip
def test_it_sees_through_the_wrappers_of_optax(wrap):
    found = rows(wrap(go.galore_muon(1e-3, rank=4)), model())
    assert found["layers/0/up/kernel"].rank == 4
    assert found["layers/0/up/kernel"].reason == "the last two axes"


def test_it_says_when_nothing_is_projected():
    """An example is adapters of a rank below the optimizer's, for which GUM is plain Muon."""
    params = {f"q_{i}": {"kernel_lora_a": shape(16, 2), "kernel_lora_b": shape(2, 16)} for i in range(2)}
    description = go.describe(go.gum(1e-3, rank=4), params)
    assert "nothing is projected at rank 4" in description.notes[0]
    assert "full-size momentum" in description.notes[0]
    assert all(row.rank is None for row in description.leaves)


def test_it_says_which_matrices_run_at_full_rank_and_why():
    params = model() | {"small": {"kernel": shape(3, 40)}}
    notes = go.describe(go.gum(1e-3, rank=4), params).notes
    assert any(note.startswith("small/kernel") and "at most the rank 4" in note for note in notes)
    assert any(note.startswith("odd/kernel") and "no other block has its shape" in note for note in notes)


def test_it_shows_both_readings_of_an_ambiguous_leaf():
    params = {"attention": {"query": {"kernel": shape(6, 6, 6)}, "out": {"kernel": shape(6, 6, 6)}}}
    notes = go.describe(go.muon(1e-3), params).notes
    assert len(notes) == 2
    for note, chosen in zip(sorted(notes), (go.SPLIT_HEADS_OUTPUT, go.SPLIT_HEADS_INPUT), strict=True):
        assert str(chosen) in note
        assert str(go.LAST_TWO) in note


def test_parts_and_the_users_own_numbers_are_named_as_such():
    params = {f"{i}": {"qkv": {"kernel": shape(16, 32)}, "up": {"kernel": shape(16, 24)}} for i in range(2)}
    spec = {"*/qkv/*": go.Parts((16, 8, 8)), "*/up/*": go.LAST_TWO}
    found = rows(go.gum(1e-3, rank=4, weight_dimension_numbers=spec), params)
    assert found["0/qkv/kernel"].blocks == "1 of 16 × 16 + 1 of 8 × 16 + 1 of 8 × 16"
    assert found["0/qkv/kernel"].reason == "your pattern '*/qkv/*'"
    tree = {f"{i}": {"qkv": {"kernel": go.LAST_TWO}, "up": {"kernel": None}} for i in range(2)}
    found = rows(go.gum(1e-3, rank=4, weight_dimension_numbers=tree), params)
    assert [found[f"0/{x}/kernel"].kind for x in ("qkv", "up")] == ["matrix", "other"]
    assert found["0/up/kernel"].reason == "your dimension numbers"


def test_leaves_with_declared_shardings_have_rows_with_the_side_that_is_projected():
    """With the rows of `up` sharded, its columns are projected; a fused kernel has its parts."""
    mesh = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,))
    params = {"norm": {"scale": shape(16)}, "qkv": {"kernel": shape(16, 32)}, "up": {"kernel": shape(16, 24)}}
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec("x")), params)
    spec = go.with_shardings(shardings, {"qkv/*": go.Parts((16, 8, 8)), "up/*": go.LAST_TWO, "norm/*": None})
    description = go.describe(go.galore_muon(1e-3, rank=4, weight_dimension_numbers=spec), params)
    found = {row.name: row for row in description.leaves}
    assert found["up/kernel"][2:5] == ("matrix", "1 of 24 × 16", 4)
    assert found["qkv/kernel"].blocks == "1 of 16 × 16 + 1 of 8 × 16 + 1 of 8 × 16"
    assert found["norm/scale"].kind == "other"
    assert description.notes == ()


def test_a_leaf_may_be_a_number_of_python():
    params = {"kernel": shape(8, 16), "temperature": 1.0}
    for tx in (go.muon(1e-3), optax.adamw(1e-3)):
        assert rows(tx, params)["temperature"].shape == ()


def test_an_optimizer_of_another_library_is_described_by_its_state_alone():
    found = rows(optax.adamw(1e-3), model())
    assert {row.kind for row in found.values()} == {"other", "state"}
    assert found["odd/kernel"].state == 2 * 12 * 20 * 4


def test_what_is_no_transformation_is_refused():
    with pytest.raises(TypeError, match=r"tx must be an optax\.GradientTransformation"):
        go.describe("gum", model())
