"""The documents are true."""

import ast
import functools
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax as go

from helpers import OPTIMIZERS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
README = (ROOT / "README.md").read_text()


def page(name):
    return (ROOT / "docs" / name).read_text()


def blocks(language, text=README):
    return [body for name, body in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) if name == language]


def block(text, word):
    """The only Python block of a page that contains a word."""
    (code,) = [code for code in blocks("python", text) if word in code]
    return code


def test_write_your_own_runs():
    names: dict = {}
    exec(block(README, "unbiased_low_rank"), names)
    tx, params = names["tx"], {"w": jnp.ones((8, 16, 24))}
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(params, state, params)
    assert updates["w"].shape == (8, 16, 24)
    (sampled,) = states_of(go.SampledState, state)
    assert sampled.index["16x24"].shape == (2,)


def test_the_first_lines_train_a_model(capsys):
    """A newcomer copies them as they are, so every name in them is imported."""
    names: dict = {}
    exec(block(README, "nnx.Optimizer"), names)
    assert float(capsys.readouterr().out) < 0.8  # at first 1.3
    assert int(go.metrics(names["optimizer"])["refresh_count"]) == 4


def test_the_lines_for_a_mesh_place_the_state_and_take_a_step():
    names: dict = {}
    exec(block(page("meshes.md"), "state_shardings"), names)
    params, state = names["params"], names["state"]
    steps, state = jax.jit(names["tx"].update)(params, state, params)
    assert jax.tree.structure(steps) == jax.tree.structure(params)
    assert float(names["value"]) > 0
    placed = jax.tree.map(lambda x, sharding: x.sharding == sharding, names["state"], names["states"])
    assert all(jax.tree.leaves(placed))


def test_the_lines_that_project_before_the_reduce_take_a_step_of_several_microbatches():
    names: dict = {}
    exec(block(page("meshes.md"), "projected_update"), names)
    assert float(names["value"]) > 0
    assert int(go.metrics(names["state"])["refresh_count"]) == 1
    assert all(float(jnp.ptp(x)) > 0 for x in jax.tree.leaves(names["params"]))


def test_the_lines_about_bfloat16_weights_take_a_step():
    step, *_ = blocks("python", page("running.md"))
    names: dict = {}
    exec(step, names)
    params = names["params"]["kernel"]
    assert params.dtype == jnp.bfloat16
    assert 0.5 < float(params.astype(jnp.float32).mean()) < 1


def test_the_lines_about_eight_bits_hold_a_quarter_of_the_state():
    _, code, _ = blocks("python", page("running.md"))
    names: dict = {}
    exec(code.replace("gum(1e-3,", "gum(1e-3, rank=32,"), names)
    params = {"kernel": jnp.ones((4, 128, 256)), "embedding": jnp.ones((512, 128))}
    plain = go.gum(1e-3, rank=32)
    sizes = [sum(go.memory_report(tx, params).state.values()) for tx in (names["tx"], plain)]
    assert sizes[0] < 0.27 * sizes[1]


def test_the_lines_about_embedding_and_head_hold_no_moments_of_their_size():
    *_, code = blocks("python", page("running.md"))
    names: dict = {}
    exec(code, names)
    params = {"embedding": jnp.ones((256, 128)), "lm_head": {"kernel": jnp.ones((128, 256))}}
    params |= {"up": {"kernel": jnp.ones((16, 24))}, "norm": jnp.ones(128)}
    state = names["tx"].init(params)
    others = sum(x.size for x in jax.tree.leaves(state.inner.inner_states["others"]))
    assert others < 0.05 * 2 * 2 * 256 * 128
    updates, _ = jax.jit(names["tx"].update)(params, state, params)
    # Of gradients of one the first step is one, and the decay of weights of one is 0.1.
    np.testing.assert_allclose(updates["lm_head"]["kernel"], -1e-3 * 1.1, rtol=1e-4)


# The Python blocks of each page that have tests of their own, here or in `test_kernels.py`.
TESTED = {
    **{"README.md": 2, "index.md": 2, "running.md": 3, "trainers.md": 4, "layerwise.md": 4, "muon.md": 3},
    **{"matrices.md": 2, "meshes.md": 2, "numbers.md": 1, "finetuning.md": 1, "gpu.md": 1},
}
# Those that do not run by themselves: lines of the scripts in examples/trainers, and the end of a function.
NOT_ALONE = {"trainers.md": 4, "CONTRIBUTING.md": 1}
# All others run, page by page, each block after those above it.
WITH_BLOCKS = {str(path.relative_to(ROOT)).removeprefix("docs/"): path for path in PAGES}
WITH_BLOCKS = {name: path for name, path in WITH_BLOCKS.items() if blocks("python", path.read_text())}
IN_ORDER = [name for name in WITH_BLOCKS if name not in (*TESTED, *NOT_ALONE)]


def test_no_python_block_of_a_page_is_left_out():
    """A new block of a page in `TESTED` needs a test of its own, and a higher number."""
    for name in {*TESTED, *NOT_ALONE}:
        number = len(blocks("python", WITH_BLOCKS[name].read_text()))
        assert number == TESTED.get(name, 0) + NOT_ALONE.get(name, 0), name
    assert "recipes.md" in IN_ORDER


@pytest.mark.parametrize("name", IN_ORDER)
def test_the_blocks_of_a_page_run_one_after_the_other(name, capsys):
    """They print what their comments say: `print(...)  # 2: ...`."""
    names: dict = {}
    codes = blocks("python", page(name))
    for code in codes:
        exec(code, names)
    expected = re.findall(r"^print\(.*\)  # ([\w.]+)", "".join(codes), re.MULTILINE)
    assert capsys.readouterr().out.split() == expected


def test_the_recipes_do_what_they_say():
    """What the page says of optax's own functions."""
    params = {"kernel": jnp.ones((2, 8, 8)), "bias": jnp.ones(8)}
    bad = params | {"bias": jnp.full(8, jnp.nan)}

    def last_update(tx, gradients):
        state, update = tx.init(params), jax.jit(tx.update)
        for g in gradients:
            updates, state = update(g, state, params)
        return updates

    # A masked leaf's gradient passes through `optax.masked`.
    masked = last_update(optax.masked(go.muon(1e-2), {"kernel": True, "bias": False}), [params])
    np.testing.assert_array_equal(masked["bias"], params["bias"])
    # A gradient that is not finite skips its microbatch, and the leaf steps with the next ones.
    tx = optax.MultiSteps(go.muon(1e-2), 2, should_skip_update_fn=optax.skip_not_finite)
    assert last_update(tx, [params, bad, params])["bias"].all()
    # Without momentum a clipped gradient makes the same step of a matrix.
    steps = [
        last_update(optax.chain(optax.clip_by_global_norm(norm), go.muon(1e-2, momentum=0.0)), [params])
        for norm in (1.0, 1e3)
    ]
    np.testing.assert_allclose(steps[0]["kernel"], steps[1]["kernel"], rtol=1e-5)


TRAINERS = blocks("python", page("trainers.md"))


@pytest.mark.parametrize(
    "code", blocks("python", page("layerwise.md")), ids=["plain", "nnx", "linen", "equinox"]
)
def test_the_lines_that_train_layer_by_layer_train(code):
    names: dict = {}
    exec(code, names)
    assert float(names["losses"][-1]) < float(names["losses"][0])
    assert int(go.metrics(names["state"])["refresh_count"]) == 1


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
    (projectors,) = [x.projectors for x in states_of(go.LowRankState, names["tx"].init(params))]
    assert list(map(jnp.shape, jax.tree.leaves(projectors))) == [(3, 16, 2)] * 3


def states_of(kind, state):
    """The outermost parts of a state that have one type."""

    def is_one(x):
        return isinstance(x, kind)

    return [x for x in jax.tree.leaves(state, is_leaf=is_one) if is_one(x)]


def test_the_oldest_versions_that_nox_tests_are_those_that_the_package_allows():
    nox = (ROOT / "noxfile.py").read_text()
    allowed = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    oldest = nox[nox.index("OLDEST = ") :].splitlines()[0]
    for name, version in re.findall(r'"([\w-]+)==([\d.]+)"', oldest):
        lowest = allowed["jax" if name == "jaxlib" else name]
        assert (version + ".0").startswith(lowest + "."), name


def test_the_readme_has_its_commands_and_ci_runs_the_last_two():
    commands = [line for block in blocks("") for line in block.splitlines() if "pip install" in line]
    assert commands == [
        "python -m pip install -e '.[examples]' && python examples/pretrain.py",
        "python -m pip install -e '.[test]' && python -m pytest -n 2",
        "python -m pip install -e '.[docs]' && mkdocs build --strict",
    ]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands[1] in ci
    assert any(line.startswith(commands[2]) for line in ci)


# The optimizers of the table: the page that each links to, and its state.
TABLE = re.findall(r"^\| \[`(\w+)`\]\(([\w/.]+)\) \|.*\| `([^`]*)` \|$", page("parts.md"), re.MULTILINE)
STATE = {name: state for name, _, state in TABLE}


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


def test_every_optimizer_has_a_page_a_picture_and_a_place_in_the_navigation():
    assert set(STATE) == set(OPTIMIZERS)
    names = [*STATE, "adamw_8bit"]  # which is no optimizer of matrices
    assert [target for _, target, _ in TABLE] == [f"optimizers/{name}.md" for name in STATE]
    assert sorted(path.stem for path in (ROOT / "docs" / "optimizers").glob("*.md")) == sorted(names)
    navigation = (ROOT / "mkdocs.yml").read_text()
    for name in names:
        text = page(f"optimizers/{name}.md")
        assert len(text.splitlines()) < 40, name
        assert f"]({name}.svg)" in text
        assert "<svg" in page(f"optimizers/{name}.svg")
        assert "\n## Beside its paper\n" in text
        assert f"\n::: gum_optax.{name}\n" in text
        assert f"- {name}: optimizers/{name}.md\n" in navigation


def test_every_link_within_the_repository_leads_somewhere():
    for path in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
            leads_to = (path.parent / target) if target else path
            assert leads_to.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(leads_to), f"{path.name}: {target}#{anchor}"


def anchors(path):
    """GitHub's anchors for the headings of a page."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Pages with the tables of the benchmarks, and tables so long that a page links to them.
RESULTS = (
    "losses.md",
    "longer_runs.md",
    "fine_tuning.md",
    "memory_and_compilation.md",
    "times.md",
    "devices.md",
    "claims.md",
)
LINKED = ("speed.md", "guard.md", "cost_model.md", "layerwise.md")


def test_the_pages_of_results_have_the_measured_tables():
    pages = "".join(page(f"results/{name}") for name in RESULTS)
    tables = sorted(path.name for path in ROOT.glob("docs/results/*.md"))
    for name in set(tables) - {"README.md", *RESULTS, *LINKED}:
        assert page(f"results/{name}").strip() in pages, name
    for name in LINKED:
        assert f"]({name})" in pages, name


def test_the_pages_tell_the_version_of_the_package():
    assert f"\nversion: {go.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(name for name in sections if name != "Unreleased") == go.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_the_memory_of_a_whole_step_in_the_readme_is_what_the_report_prints():
    """The README rounds the table of docs/gpu.md, which is the report's output."""
    columns, *rows = re.findall(r"^  \|(.*) \|$", README, re.MULTILINE)
    names = [re.sub(r"[`\[]|\]\(.*?\)", "", column) for column in columns.split(" | ")[1:]]
    report = {
        line[2:28].strip(): [float(number) for number in re.findall(r"\d+\.\d+", line)]
        for line in page("gpu.md").splitlines()
        if re.match(r"  \S.{24} +\d", line)
    }
    for row, column in zip(rows, (1, 2), strict=True):  # held, ordinary, layer by layer
        expected = [f"{report[name][column]:.1f}" for name in names]
        assert row.split(" | ")[1:] == expected


def test_the_first_pages_are_short():
    for path in (ROOT / "README.md", ROOT / "docs" / "results" / "README.md"):
        assert len(path.read_text().splitlines()) <= 150, path


def test_the_lines_of_the_first_page_train_a_model_and_show_it(capsys):
    train, look = blocks("python", page("index.md"))
    names: dict = {}
    exec(train, names)
    assert float(names["value"]) < 0.5 < np.log(64)
    exec(look, names)
    shown = capsys.readouterr().out
    assert "an embedding by name" in shown
    assert "residual_share" in shown
    model = names["nnx"].eval_shape(lambda: names["Net"](names["nnx"].Rngs(0)))
    shapes = names["nnx"].state(model, names["nnx"].Param)
    assert str(go.describe(names["tx"], shapes)) == str(go.describe(names["tx"], names["params"]))


def test_learning_rates_are_converted_by_the_size_of_the_steps(capsys):
    """The RMS of real steps at a learning rate of one, on both orientations."""
    (code,) = blocks("python", page("numbers.md"))
    names: dict = {}
    exec(code, names)
    assert [float(line) for line in capsys.readouterr().out.split()] == pytest.approx(
        [0.003125, 0.004, 0.00125]
    )
    makers = {
        "muon": functools.partial(go.muon, orthogonalizer=go.polar),
        "jordan": functools.partial(go.muon, orthogonalizer=go.polar, consistent_rms=None),
        "galore_muon": functools.partial(go.galore_muon, rank=4, orthogonalizer=go.polar),
        # The first step of Adam has an RMS of 1 in place of 0.2.
        "galore": lambda rate: go.galore(rate / 5, rank=4),
        "sinkgd": go.sinkgd,
    }
    for shape in ((16, 40), (40, 16)):
        params = {"kernel": jax.random.normal(jax.random.key(0), shape)}
        for name, make in makers.items():
            tx = make(1.0)
            updates, _ = tx.update(params, tx.init(params), params)
            rms = float(jnp.sqrt(jnp.mean(updates["kernel"] ** 2)))
            assert rms == pytest.approx(names["step_rms"](name, *shape, rank=4), rel=1e-3), (name, shape)
            factor = go.shape_factor(None if name == "jordan" else 0.2)(*shape) / max(shape) ** 0.5
            assert name not in ("jordan", "muon") or rms == pytest.approx(factor, rel=1e-3)


def test_the_lines_without_a_backward_pass_learn():
    (code,) = blocks("python", page("finetuning.md"))
    names: dict = {}
    exec(code, names)
    assert float(names["value"]) < 0.9  # at first 1


def test_every_public_name_is_in_the_reference():
    """And every name of the site's navigation is a page."""
    source = (ROOT / "docs_hooks.py").read_text().replace("from mkdocs.structure.files import File\n", "")
    names: dict = {"__file__": str(ROOT / "docs_hooks.py")}
    exec(source, names)
    pages = names["reference"]()
    texts = [*pages.values(), *(path.read_text() for path in ROOT.glob("docs/optimizers/*.md"))]
    documented = re.findall(r"^::: gum_optax\.(\w+)$", "".join(texts), re.MULTILINE)
    public = {name for name in dir(go) if not name.startswith("_")} - {"report", "trainers"}
    assert sorted(documented) == sorted(public)
    navigation = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    for name in navigation:
        assert name in pages or name in names["PAGES"].values() or (ROOT / "docs" / name).is_file(), name
    assert set(pages) <= set(navigation)


def test_the_lines_about_matrices_describe_a_model_and_take_each_leaf_for_its_role(capsys):
    see, decide = blocks("python", page("matrices.md").replace("\n  ", "\n"))
    exec(see, {})
    assert "an embedding by name" in capsys.readouterr().out
    names: dict = {}
    exec(decide, names)
    shapes = {
        "b/router": (64, 8),
        "decoder/layers/up": (64, 3, 128),
        "a/c_attn": (64, 32),
        "a/qkv": (64, 128),
    }
    params = {f"{name}/kernel": jnp.ones(shape) for name, shape in shapes.items()}
    found = {leaf.name: leaf.blocks for leaf in go.describe(names["tx"], params).leaves}
    assert [found[name] for name in params] == [
        "",
        "3 of 64 × 128",
        "1 of 32 × 64",
        "1 of 64 × 64 + 1 of 32 × 64 + 1 of 32 × 64",
    ]


def test_the_lines_about_muons_parts_take_a_step_and_clip_what_exceeds():
    gum, decay, clip = blocks("python", page("muon.md"))
    params = {"kernel": jnp.ones((4, 8, 12)), "bias": jnp.ones(12)}
    for code in (gum.replace("128", "2"), decay):
        names: dict = {}
        exec(code, names)
        tx = names["tx"]
        updates, _ = tx.update(params, tx.init(params), params)
        assert all(u.any() for u in jax.tree.leaves(updates))
    names = {}
    exec(clip.replace("threshold=100.0", "threshold=0.0"), names)
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 3, 16)))
    assert names["train_step"](names["model"], names["optimizer"], x, x) > 0
    model = names["model"]
    assert jnp.abs(model.query.kernel[...]).max() < 1e-6
    assert model.value.kernel[...].any()


# Names in backticks from other sources: shells, JAX, trainers, models of other libraries, the reader.
FOREIGN = {
    *("print", "OPENBLAS_NUM_THREADS", "pytest_cache", "new_tx"),
    *("jax_enable_x64", "jax_threefry_partitionable", "memory_analysis", "out_shardings", "shard_map"),
    *("static_args", "MuonDimensionNumbers", "CheckpointManager", "PeftTrainer", "adamw_mask", "opt_type"),
    *("dt_bias", "output_proj", "max", "MultiSteps", "should_skip_update_fn", "donate_argnums"),
}


def words_of(path):
    """The names in a file: functions, classes, arguments, fields, constants, and strings that are names."""
    words = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            words.add(node.name)
        elif isinstance(node, ast.arg):
            words.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            words.add(node.value)
        if isinstance(node, ast.Module | ast.ClassDef):  # not a function's variables
            targets = [getattr(x, "targets", None) or [getattr(x, "target", x)] for x in node.body]
            words |= {x.id for found in targets for x in found if isinstance(x, ast.Name)}
    return words


FOLDERS = ("gum_optax", "examples", "benchmarks", "tests", "docs", "findings")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).glob("**/*")] + list(ROOT.glob("*.*"))
WORDS = {word for path in FILES for word in (path.stem, *path.relative_to(ROOT).parts)} | FOREIGN
WORDS |= {
    word for path in FILES if path.suffix == ".py" and "tests" not in path.parts for word in words_of(path)
}
CALLS = {name for name in dir(go) if not name.startswith("_")} | FOREIGN
FILE = r"[\w/.-]+\.(?:py|md|toml|sh|json|jsonl|png|txt|cff)\b"
# Ignored in backticks: files, dotted names of other libraries, options of commands, quoted values.
ELSEWHERE = FILE + r"|(?<![\w.])\w+(?:\.\w+)+|--[\w-]+|\"[^\"]*\""
LIKE_OURS = r"(?<!\w)(?:_[a-z]\w*|[a-z]+(?:_[a-z0-9]+)+|[A-Z][a-z]+(?:[A-Z][a-z]+)+|[A-Z]+_[A-Z_]+)(?!\w)"


def exists(name):
    """Whether a dotted name is public, a module of this library, or a name in such a module."""
    folder, _, last = name.rpartition(".")
    module = ROOT / folder.replace(".", "/")
    if module == ROOT / "gum_optax" and hasattr(go, last):
        return True
    if (module / last).is_dir() or (module / f"{last}.py").exists():
        return True
    file = module.with_suffix(".py")
    return file.exists() and last in words_of(file)


def invented(text):
    """Names that look like this library's and do not exist.

    The function looks at `gum_optax.x` anywhere, and in backticks at files, calls, and names of several
    words.
    """
    found = {name for name in re.findall(r"\bgum_optax(?:\.\w+)+", text) if not exists(name)}
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        files = {name for name in re.findall(FILE, span) if name.endswith((".py", ".md", ".toml"))}
        found |= {name for name in files if not any(path.match(name) for path in FILES)}
        rest = re.sub(ELSEWHERE, "", span)
        found |= set(re.findall(r"\b([a-z]\w*)\(", rest)) - CALLS
        found |= set(re.findall(LIKE_OURS, rest)) - WORDS
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_in_backticks_that_looks_like_ours_exists(path):
    assert invented(path.read_text()) == set()


@pytest.mark.parametrize(
    "name",
    [
        *("gum_optax.gumm", "gum_optax.trainers.nobody", "tests/test_nothing.py", "nothing.md"),
        *("lower_rank_fraction", "_optimiser", "LowerRankState", "IN_OUT"),
    ],
)
def test_a_name_that_does_not_exist_is_found(name):
    assert invented(f"This is `{name}`, beside `full_rank_fraction` of `gum(1e-3)`.") == {name}


def test_a_call_of_a_function_that_does_not_exist_is_found():
    assert invented("`switch(steps, first, then)` and `switch_subspace(steps, first, then)`") == {"switch"}
