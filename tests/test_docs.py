"""What the documents say is what happens."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gum_optax as go

from helpers import OPTIMIZERS, run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return [body for name, body in re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL) if name == language]


def test_write_your_own_runs():
    (code,) = [block for block in blocks("python") if "unbiased_low_rank" in block]
    names: dict = {}
    exec(code, names)
    updates, state = run(names["tx"], [{"w": jnp.ones((8, 16, 24))}] * 2)
    assert updates[-1]["w"].shape == (8, 16, 24)
    assert state[0].outside.index["16x24"].shape == (2,)


def test_the_usage_lines_build_the_transformation_that_they_show():
    (code,) = [block for block in blocks("python") if "nnx.Optimizer" in block]
    names: dict = {}
    exec(code[: code.index("state = ")], names)
    assert names["tx"].init({"kernel": jnp.ones((3, 4))})


def test_the_lines_for_a_mesh_place_the_state_and_take_a_step():
    (code,) = [block for block in blocks("python") if "state_shardings" in block]
    names: dict = {}
    exec(code, names)
    params, state = names["params"], names["state"]
    steps, state = jax.jit(names["tx"].update)(params, state, params)
    assert jax.tree.structure(steps) == jax.tree.structure(params)
    placed = jax.tree.map(lambda x, sharding: x.sharding == sharding, names["state"], names["states"])
    assert all(jax.tree.leaves(placed))


def test_the_lines_that_project_before_the_reduce_take_a_step_of_several_microbatches():
    (code,) = [block for block in blocks("python") if "projected_update" in block]
    names: dict = {}
    exec(code, names)
    assert float(names["value"]) > 0
    assert int(go.metrics(names["state"])["refresh_count"]) == 1
    assert all(float(jnp.ptp(x)) > 0 for x in jax.tree.leaves(names["params"]))


TRAINERS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trainers.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", TRAINERS[:3], ids=["nnx", "linen", "equinox"])
def test_the_lines_for_a_trainer_train(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert float(names["losses"][-1]) < float(names["losses"][0])
    if "eqx" in names:
        again = names["eqx"].tree_deserialise_leaves(
            "state.eqx", jax.tree.map(jnp.zeros_like, names["state"])
        )
        jax.tree.map(np.testing.assert_array_equal, again, names["state"])


def test_the_patterns_for_scanned_kernels_make_stacks_of_layers():
    names: dict = {}
    exec(TRAINERS[-1], names)
    shapes = {"mlp/up": (16, 3, 32), "query": (16, 3, 4, 8), "out": (4, 3, 8, 16)}
    params = {f"decoder/{name}/kernel": jnp.ones(shape) for name, shape in shapes.items()}
    (projectors,) = [x.projectors for x in low_rank_states(names["tx"].init(params))]
    assert list(map(jnp.shape, jax.tree.leaves(projectors))) == [(3, 16, 2)] * 3


def low_rank_states(state):
    is_one = lambda x: isinstance(x, go.LowRankState)  # noqa: E731
    return [x for x in jax.tree.leaves(state, is_leaf=is_one) if is_one(x)]


def test_the_oldest_versions_that_nox_tests_are_those_that_the_package_allows():
    nox = (ROOT / "noxfile.py").read_text()
    allowed = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    oldest = nox[nox.index("OLDEST = ") :].splitlines()[0]
    for name, version in re.findall(r'"([\w-]+)==([\d.]+)"', oldest):
        lowest = allowed["jax" if name == "jaxlib" else name]
        assert (version + ".0").startswith(lowest + "."), name


def test_the_readme_has_exactly_the_two_commands_and_ci_runs_the_second():
    commands = [line for block in blocks("") for line in block.splitlines() if "pip install" in line]
    assert commands == [
        "python -m pip install -e '.[examples]' && python examples/pretrain.py",
        "python -m pip install -e '.[test]' && python -m pytest -n 2",
    ]
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


STATE = dict(re.findall(r"^\| `(\w+)` \|.*\| `([^`]*)` \|$", README, re.MULTILINE))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_in_the_table_is_what_init_allocates(name):
    blocks, m, n, r, slots = 12, 16, 40, 4, 2
    make, _ = OPTIMIZERS[name]
    takes = inspect.signature(make).parameters
    arguments = {"rank": r, "full_rank_fraction": slots / blocks}
    tx = make(0.1, **{key: value for key, value in arguments.items() if key in takes})
    state = jax.eval_shape(tx.init, {"kernel": jnp.zeros((blocks, m, n))}).inner.inner_states["matrices"]
    numbers = sum(x.size for x in jax.tree.leaves(state) if x.ndim >= 2)
    formula = re.sub(r"(?<=[\w)]) (?=[\w(])", "*", STATE[name].replace("γ/L", f"{slots}/{blocks}"))
    assert numbers == pytest.approx(blocks * eval(formula, {"m": m, "n": n, "r": r}))


def test_every_link_within_the_repository_leads_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readmes_table_of_results_is_the_measured_one():
    for name in ("comparison.md", "linear_regression.md"):
        assert (ROOT / "docs" / "results" / name).read_text().strip() in README


PUBLIC = [name for name, x in vars(go).items() if not name.startswith("_") and not inspect.ismodule(x)]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name):
    thing = getattr(go, name)
    assert not callable(thing) or (thing.__doc__ or "").strip(), name
