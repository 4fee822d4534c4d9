"""A mesh of forced host devices exchanges little, and gives the result of a single device."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import gum_optax as go
from gum_optax._matrices import with_shardings

from helpers import CORE, OPTIMIZERS

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))

import cost_model  # noqa: E402

# Runs in a separate process, because the number of host devices is fixed when JAX starts.
SCRIPT = """
import json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import gum_optax as go

mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
kernel = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
tx = go.sinkgd(0.1)
alone, _ = jax.jit(tx.update)({"kernel": jnp.asarray(kernel)}, tx.init({"kernel": kernel}))
found = {}
for spec in (P("x", None), P(None, "x"), P("x", "y"), P(("x", "y"), None)):
    g = {"kernel": jax.device_put(kernel, NamedSharding(mesh, spec))}
    compiled = jax.jit(tx.update).lower(g, tx.init(g)).compile()
    u, _ = compiled(g, tx.init(g))
    # An operation may exchange several arrays at once: every shape of its result counts.
    operation = r"= (.*?) (all-[a-z]+|reduce-scatter|collective-[a-z]+)(?:-start)?\\("
    found[str(spec)] = {
        "collectives": [
            [kind, int(np.prod([int(d) for d in shape.split(",") if d]))]
            for result, kind in re.findall(operation, compiled.as_text())
            for shape in re.findall(r"\\[([\\d,]*)\\]", result)
        ],
        "error": float(np.abs(np.asarray(u["kernel"]) - np.asarray(alone["kernel"])).max()),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_sinkgd_exchanges_vectors_only(found):
    """No collective sends more numbers than the matrix has rows or columns, under every sharding."""
    for spec, result in found.items():
        assert result["collectives"], spec
        for kind, size in result["collectives"]:
            assert kind == "all-reduce", (spec, kind)
            assert size <= 96, (spec, size)


def test_sharded_sinkgd_is_sinkgd(found):
    for spec, result in found.items():
        assert result["error"] < 1e-6, spec


# Two optimizers per process.
PAIRS = [[*CORE[i::3]] for i in range(3)]
REST = [name for name in OPTIMIZERS if name not in CORE]
PAIRS += [pytest.param(REST[i::4], marks=pytest.mark.long) for i in range(4)]


@pytest.mark.parametrize("names", PAIRS, ids=",".join)
def test_on_every_layout_an_optimizer_does_what_it_does_on_one_device(names):
    """FSDP on either axis, tensor parallel, 2-D, scanned, experts, heads; a rank that not all axes divide."""
    check_eight_devices(names, 1e-5)


def test_on_every_layout_codes_of_eight_bits_are_those_of_one_device():
    """A rounding of float32 may decide a code."""
    check_eight_devices(["eight bits"], 1e-3)


def check_eight_devices(names, largest_gap):
    command = [sys.executable, "on_eight_devices.py", *names]
    done = subprocess.run(command, cwd=HERE, env=os.environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert list(results) == names
    for name, settings in results.items():
        for setting, found in settings.items():
            assert found["gap"] < largest_gap, (name, setting)
            assert found["repeats"], (name, setting)
            assert found["draws"], (name, setting)
            assert found["stays"], (name, setting)


# One case for each LAPACK function; the other cases take longer.
AT_SIZE = ["sumo,", "cosmos,", "galore_muon,", "galore_muon,svd_subspace"]
MORE_AT_SIZE = [f"{name}," for name in OPTIMIZERS if f"{name}," not in AT_SIZE]
# Rounding may flip columns of `randomized_svd`, SUMO's default; only a momentum that rotates follows them.
MORE_AT_SIZE += ["galore_muon,random_subspace", "sumo,svd_subspace", "sumo,track_subspace"]
BY_CASES = [AT_SIZE, *(pytest.param(MORE_AT_SIZE[i::3], marks=pytest.mark.long) for i in range(3))]


@pytest.mark.parametrize("cases", BY_CASES, ids="|".join)
def test_at_an_ordinary_size_no_device_waits_for_ever_and_all_find_what_one_does(cases):
    """A stack with factorizations worth several threads, sharded on both sides, refreshes in every step."""
    command = [sys.executable, "on_eight_devices.py", *cases]
    done = subprocess.run(command, cwd=HERE, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # the case that started last
    gaps = json.loads(done.stdout.splitlines()[-1])
    assert list(gaps) == cases
    for case, gap in gaps.items():
        assert gap < 1e-5, case


WITHOUT_LAPACK = ("muon", "normuon", "swan", "sinkgd", "scion", "trion", "adalomo", "hfac")
# The stack of each LAPACK call in a program, such as `4x`; empty for a single matrix.
STACK = re.compile(r"@lapack_(\w+)\(.*: \(tensor<((?:\d+x)*?)\d+x\d+xf32>")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_cpu_is_never_given_a_stack_to_decompose(name):
    """A call for a stack would wait for its parts on the threads that compute them (jaxlib 0.10, 0.11)."""
    make, arguments = OPTIMIZERS[name]
    tx = make(1e-2, **arguments)
    params = {"kernel": jax.ShapeDtypeStruct((2, 3, 6, 9), jnp.float32)}
    program = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params).as_text()
    calls = STACK.findall(program)
    assert len(calls) == program.count("@lapack_")
    assert bool(calls) == (name not in WITHOUT_LAPACK)
    assert {stack for _, stack in calls} <= {"", "1x"}, calls


@pytest.mark.parametrize(
    "method", [go.svd_subspace, go.randomized_svd, go.random_subspace, go.track_subspace]
)
def test_no_finder_gives_a_cpu_a_stack_to_decompose(method):
    shapes = jax.random.key(0), jnp.ones((2, 3, 6, 9)), jnp.ones((2, 3, 6, 2))
    program = jax.jit(lambda *arrays: method(*arrays)).lower(*shapes).as_text()
    calls = STACK.findall(program)
    assert len(calls) == program.count("@lapack_")
    assert {stack for _, stack in calls} == {""}, calls


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((1, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def specs_of(tx, shapes, specs, mesh):
    """The nonempty specs of the state, by the last names of their paths."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    state = go.state_shardings(tx, params, shardings)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(tx.init, params))
    assert all(sharding.mesh == mesh for sharding in jax.tree.leaves(state))
    found = {}
    for path, sharding in jax.tree_util.tree_leaves_with_path(state):
        if any(sharding.spec):
            found[jax.tree_util.keystr(path[-2:])] = sharding.spec
    return found


def test_projectors_follow_the_rows_coordinates_the_columns_and_slots_both(mesh):
    tx = go.as_matrices(go.unbiased_low_rank(optax.trace(0.9), 2, 3, 0.5))
    shapes = {"wide": (4, 8, 16), "tall": (4, 16, 8)}
    specs = {"wide": P(None, "x", "y"), "tall": P("x", None, "y")}
    assert specs_of(tx, shapes, specs, mesh) == {
        ".projectors['wide']": P(None, "x", None),
        ".projectors['tall']": P("x", "y", None),
        ".trace['wide']": P(None, None, "y"),
        ".trace['tall']": P("x", None, None),
        ".trace['8x16']": P(None, "y", None),
    }


def test_of_axes_seen_as_one_the_first_keeps_its_sharding(mesh):
    dims = optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    tx = go.as_matrices(go.low_rank(optax.trace(0.9), 2, 3), dims)
    for heads, size, kept in (("y", None, "y"), (None, "y", None), ("x", "y", "x")):
        found = specs_of(tx, {"query": (4, 4, 8)}, {"query": P(None, heads, size)}, mesh)
        assert found == ({".trace['query']": P(None, kept)} if kept else {})


def test_state_of_any_optax_transformation_is_sharded_as_its_parameters(mesh):
    found = specs_of(optax.adamw(1e-3), {"w": (4, 8)}, {"w": P("x", "y")}, mesh)
    assert found == {".mu['w']": P("x", "y"), ".nu['w']": P("x", "y")}


def test_state_is_planned_for_a_mesh_that_is_not_here_and_within_another_one(mesh):
    params = {"w": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    away = AbstractMesh((2, 16), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    other = jax.make_mesh((1,), ("z",), axis_types=(AxisType.Auto,))
    for where in (away, mesh):
        with jax.set_mesh(other):
            found = go.state_shardings(optax.trace(0.9), params, {"w": NamedSharding(where, P("x"))})
        assert found.trace["w"] == NamedSharding(where, P("x", None))


def test_shardings_that_are_none_or_of_several_meshes_are_refused(mesh):
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((4, 8))}
    here = NamedSharding(mesh, P("x"))
    other = NamedSharding(jax.make_mesh((1,), ("z",), axis_types=(AxisType.Auto,)), P("z"))
    with pytest.raises(TypeError, match="NamedSharding for each leaf, got SingleDevice"):
        go.state_shardings(go.muon(0.1), params, {"a": here, "b": SingleDeviceSharding(jax.devices()[0])})
    with pytest.raises(ValueError, match="of one mesh, got 2 meshes"):
        go.state_shardings(go.muon(0.1), params, {"a": here, "b": other})
    for one in (here, None, {"a": here}):
        with pytest.raises(ValueError, match=r"param_shardings must be a tree like params with .*, got .*: "):
            go.state_shardings(go.muon(0.1), params, one)
    with pytest.raises(TypeError, match="tx must be an optax"):
        go.state_shardings("muon", params, {"a": here, "b": here})


def numbers_of(tx, shapes):
    """The shapes of the projectors of `low_rank`."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return jax.tree.map(lambda x: x.shape, jax.eval_shape(tx.init, params).projectors)


def test_a_matrix_sharded_along_one_side_is_projected_along_the_other(mesh):
    shapes = {"rows": (8, 16), "columns": (8, 16), "both": (8, 16), "neither": (8, 16), "stack": (4, 8, 16)}
    specs = {
        "rows": P("x"),
        "columns": P(None, "y"),
        "both": P("x", "y"),
        "neither": P(),
        "stack": P(None, "x"),
    }
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    tx = go.as_matrices(
        go.low_rank(optax.identity(), 2, 3), go.with_shardings(shardings, lambda _: go.LAST_TWO)
    )
    found = numbers_of(tx, shapes)
    assert {name: shape[-2] for name, shape in found.items()} == {
        "rows": 16,
        "columns": 8,
        "both": 16,  # the longer
        "neither": 8,
        "stack": 16,
    }
    assert found["stack"] == (4, 16, 2)


def test_a_matrix_without_a_sharding_is_named(mesh):
    params = {"a": {"kernel": jnp.ones((4, 8))}, "b": {"kernel": jnp.ones((4, 8))}, "bias": jnp.ones(4)}
    shardings = {"a": {"kernel": NamedSharding(mesh, P("x"))}}
    tx = go.muon(0.1, weight_dimension_numbers=go.with_shardings(shardings))
    with pytest.raises(TypeError, match=r"for leaf \['b'\]\['kernel'\], got None"):
        tx.init(params)


def untold(params, entries):
    return with_shardings.undeclared_shardings(params, list(entries.values()))


def test_leaves_whose_auto_shardings_the_optimizer_was_not_told_are_named():
    devices = AbstractMesh((2, 1, 2), ("x", "one", "b"), axis_types=(AxisType.Auto,) * 3)
    specs = {
        "batch": P("b", None, None),
        "both": P(None, ("one", "x"), "b"),
        "columns": P(None, None, "x"),
        "of_one": P(None, "one", None),
        "rows": P("b", "x"),
        "whole": P(),
    }
    params = {
        name: jax.ShapeDtypeStruct((4, 8, 16), jnp.float32, sharding=NamedSharding(devices, spec))
        for name, spec in specs.items()
    }
    entries = dict.fromkeys(params, go.LAST_TWO)
    assert untold(params, entries) == ["['both']", "['columns']", "['rows']"]
    # Two leaves have declared shardings, and one of the others is not a matrix.
    told = go.with_shardings({name: x.sharding for name, x in params.items()}, lambda _: go.LAST_TWO)(params)
    assert untold(params, entries | {"both": told["both"], "rows": None}) == ["['columns']"]
    # The first axis belongs to the matrix if the dimension numbers say so.
    first = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1), output_axis=-1)
    assert untold(params, dict.fromkeys(params, first))[0] == "['batch']"


def test_types_tell_the_shardings_over_explicit_axes_and_shapes_alone_have_none():
    mixed = AbstractMesh((2, 2), ("typed", "auto"), axis_types=(AxisType.Explicit, AxisType.Auto))
    specs = {"auto": P(None, "auto"), "typed": P("typed", None)}
    params = {
        name: jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mixed, spec))
        for name, spec in specs.items()
    } | {"shape": jax.ShapeDtypeStruct((8, 16), jnp.float32), "zeros": jnp.zeros((8, 16))}
    entries = dict.fromkeys(params, go.LAST_TWO)
    assert untold(params, entries) == ["['auto']"]
    inside = []
    jax.eval_shape(
        lambda tree: inside.extend(untold(tree, {"zeros": go.LAST_TWO})), {"zeros": params["zeros"]}
    )
    assert inside == []


def benchmark(name, tmp_path, *arguments, **variables):
    """The measurements of a benchmark, and its output."""
    command = [sys.executable, f"benchmarks/{name}.py", "--out", str(tmp_path), *arguments]
    # Two tests may load libtpu at the same time, because neither uses a device.
    env = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"} | variables
    done = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (setting,) = json.loads((tmp_path / f"{name}.json").read_text())["settings"].values()
    return setting["rows"], done.stdout


def exchanges(printed):
    """The number of collectives of at least a KiB in an ordinary step, by optimizer and layout."""
    counts = {}
    for line in printed.splitlines():
        if head := re.match(r"cpu (.+?)  (\S+)  ", line):
            counts[head[2], head[1]] = 0
            now = head[2], head[1]
        elif not line.strip().startswith("refresh"):
            times, wire = re.search(r"(\d+) × ([\d.]+)$", line).groups()
            counts[now] += int(times) * (float(wire) >= 0.001)
    return counts


# MiB sent by an update and a refresh of [8, 1024, 4096] at rank 128 with two slots. Only these entries have
# the size of m n. On m, the refresh makes a projector of the long side, 16 MiB, on every device.
BUDGETS = {"n": (15.5, 10), "m": (22.5, 28), "2-D": (17, 13), "2-D, 4 × 2": (24, 15)}


def check_budgets(found):
    for layout, (update, refresh) in found["gum"].items():
        assert update <= BUDGETS[layout][0], layout
        assert refresh <= BUDGETS[layout][1], layout


def test_what_gum_sends_on_eight_devices_is_within_its_budget(tmp_path):
    found, printed = benchmark(
        "collectives", tmp_path, "--verbose", "--optimizers", "gum;galore_muon;sinkgd;muon"
    )
    check_budgets(found)
    counts = exchanges(printed)
    # A Gram matrix for each of the 8 blocks where the projected side is whole (on n), the slots' Gram
    # matrices, their transfers, and the coordinates where the projected side is sharded.
    assert [counts["gum", layout] for layout in found["gum"]] == [10, 5, 9, 10]
    assert max(counts["sinkgd", layout] for layout in found["gum"]) <= 12
    # The cost to bring every matrix to one device and back; 2-D along one mesh axis after the other.
    assert [found["muon"][layout][0] for layout in found["gum"]] == [28, 28, 40, 32]
    assert max(update for update, _ in found["galore_muon"].values()) <= 5
    assert "| sinkgd | 0.33 | 1.31 | 0.33 | 0.61 |" in (tmp_path / "collectives.md").read_text()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu")
def test_what_gum_sends_on_eight_tpus_is_within_its_budget(tmp_path):
    arguments = ["--platform", "tpu", "--optimizers", "gum", "--layouts", "m"]
    check_budgets(benchmark("collectives", tmp_path, *arguments)[0])


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs XLA's CUDA plugin: nox -s gpu, or pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin",
)
def test_what_gum_sends_on_eight_gpus_is_within_its_budget(tmp_path):
    arguments = ["--platform", "h200", "--optimizers", "gum"]
    without_gpu = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": ""}
    check_budgets(benchmark("collectives", tmp_path, *arguments, **without_gpu)[0])


def test_projecting_before_the_reduce_sends_projections_and_nothing_else(tmp_path):
    """Two layers of 32 × 32 and 32 × 64 at rank 8 send coordinates, a row for the energy, and the loss."""
    arguments = ["--model", "tiny", "--optimizers", "galore_muon", "--microbatches", "2", "--seq", "8"]
    plain, projected = benchmark("projected", tmp_path, *arguments)[0].values()
    matrices, coordinates = 2 * (4 * 32 * 32 + 3 * 32 * 64), 2 * (8 + 1) * (4 * 32 + 3 * 64)
    mib = 4 / 2**20
    ring = 2 * 7 / 8
    assert plain["accumulated"] == pytest.approx(matrices * mib)
    assert plain["sent"] == pytest.approx(matrices * mib * ring)
    assert projected["accumulated"] == pytest.approx((coordinates + 1) * mib)
    assert projected["sent"] == pytest.approx(coordinates * mib * ring)  # nothing uses the loss
    # A power step sends the coordinates and their products with the gradient, (m + n) r.
    power_step = 2 * 8 * (4 * (32 + 32) + 3 * (32 + 64))
    assert projected["refresh"] == pytest.approx(power_step * mib * ring)


# One step of `examples/distributed.py`, for a slice that is not present.
SLICE = """
import sys
sys.path.insert(0, "../examples")
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType
import distributed
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
for way in ("fsdp", "projected"):
    options = distributed.parser().parse_args(["--model", "tiny", "--parallel", way, "--out", "none"])
    run = distributed.Run(options, mesh)
    program = run.step.lower(run.shapes, jax.ShapeDtypeStruct((1, 8, 129), jnp.int32)).compile()
    print(program.memory_analysis().argument_size_in_bytes)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu")
def test_the_script_for_a_tpu_slice_compiles_for_one():
    env = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", SLICE], cwd=HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    split, whole = map(int, done.stdout.split())
    assert split < whole / 2  # tokens, norms and leaves too narrow for eight chips stay whole


def test_the_cost_model_sends_what_the_compiled_program_sends():
    """`docs/results/collectives.json` is for [8, 1024, 4096] on n, with a refresh every `PERIOD` steps."""
    stored = json.loads((HERE.parent / "docs" / "results" / "collectives.json").read_text())["settings"]
    x = cost_model.Matrices(8, 1024, 4096)
    for platform in ("cpu", "tpu"):
        rows = stored[f"{platform}, 8 devices"]["rows"]
        for name, cost in (
            ("galore_muon", cost_model.galore_muon(x, 8, 128)),
            ("gum", cost_model.gum(x, 8, 128, 2 / 8)),
        ):
            update, refresh = rows[name]["n"]
            assert cost.wire / 2**20 == pytest.approx(update + refresh / cost_model.PERIOD, abs=0.01)


@pytest.mark.parametrize(("m", "n"), [(64, 256), (64, 64)])
def test_the_cost_model_counts_the_operations_that_xla_counts(m, n):
    shape = jax.ShapeDtypeStruct((m, n), jnp.float32)
    x = cost_model.Matrices(1, m, n)
    one_gram = functools.partial(go.gram_newton_schulz, restart=cost_model.STEPS)
    counted = jax.jit(one_gram).lower(shape).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(cost_model.gram_newton_schulz(x), rel=0.1)


def test_the_table_of_costs_has_a_row_a_model_a_number_of_chips_and_a_cost(tmp_path):
    cost_model.main(["--out", str(tmp_path)])
    lines = (tmp_path / "cost_model.md").read_text().splitlines()
    assert len(lines) == 2 + 3 * 3 * 3
    assert lines == (HERE.parent / "docs" / "results" / "cost_model.md").read_text().splitlines()


def test_a_rule_that_does_not_see_every_leaf_takes_told_shardings(mesh):
    params = {"a": jnp.eye(4, 8), "b": jnp.eye(4, 8)}
    shardings = dict.fromkeys(params, NamedSharding(mesh, P("x")))
    masked = optax.masked(go.orthogonalize(go.polar), {"a": True, "b": False})
    tx = go.as_matrices(masked, go.with_shardings(shardings, lambda _: go.LAST_TWO))
    steps, _ = jax.jit(tx.update)(jax.tree.map(lambda x: 3 * x, params), tx.init(params))
    np.testing.assert_allclose(steps["a"], params["a"], atol=1e-6)
    np.testing.assert_array_equal(steps["b"], 3 * params["b"])
