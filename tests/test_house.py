"""The plan of the package: which folder may import which, and how long a module and a function may be.

The floors are those of the table in CONTRIBUTING.md. A new folder gets a row there, or these tests fail.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gum_optax"
# From the top floor down to the ground.
FLOORS = re.findall(r"^\| `(_\w+)/` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
MODULES = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in sorted(PACKAGE.rglob("*.py"))}
# The glue for trainers imports the finished package from outside, as a user does.
INSIDE = {name: path for name, path in MODULES.items() if name[0] != "trainers"}


def imported(name):
    """The modules of the package that a module imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(INSIDE[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "gum_optax"}
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*name[: len(name) - node.level], *(node.module or "").split("."))
            base = tuple(part for part in base if part)
            found |= {base if base in INSIDE else (*base, alias.name) for alias in node.names}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gum_optax":
            found.add((node.module, ""))
    return found


IMPORTS = {name: imported(name) for name in INSIDE}


def floor(name):
    """The floor of a module, 0 for the ground; the public names are above all folders."""
    return len(FLOORS) - 1 - FLOORS.index(name[0]) if len(name) > 1 else len(FLOORS)


def test_the_map_names_every_folder():
    folders = {path.parent.name for path in PACKAGE.glob("_*/__init__.py")}
    assert len(FLOORS) == len(set(FLOORS)) == 10
    assert folders == set(FLOORS)


def test_every_import_within_the_package_leads_to_a_module():
    assert sum(map(len, IMPORTS.values())) > 100
    for name, targets in IMPORTS.items():
        assert targets <= INSIDE.keys(), name


@pytest.mark.parametrize("folder", FLOORS)
def test_no_import_runs_up(folder):
    modules = [name for name in IMPORTS if name[0] == folder]
    assert modules
    for name in modules:
        assert [target for target in IMPORTS[name] if floor(target) > floor(name)] == [], name


def test_no_modules_import_each_other_in_a_circle():
    left = dict(IMPORTS)
    while ready := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


def test_no_optimizer_imports_another():
    shared = {("_optimizers", name) for name in ("matrix_optimizer", "others_by_kind")}
    optimizers = [name for name in IMPORTS if name[0] == "_optimizers" and name not in shared]
    assert len(optimizers) > 10
    for name in optimizers:
        beside = {target for target in IMPORTS[name] if target[0] == "_optimizers"}
        assert beside <= shared, name


def test_the_ground_for_arrays_knows_no_optax():
    for name, path in INSIDE.items():
        if name[0] == "_linalg":
            assert "optax" not in re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE), name


# The limit does not apply to tests and benchmarks: readers read a table of cases row by row.
@pytest.mark.parametrize("path", MODULES.values(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_end_before_300_lines(path):
    assert len(path.read_text().splitlines()) < 300


def lines_of_code(path):
    """Each function of a module with its lines of code; those of inner functions count, docstrings do not."""
    text = path.read_text()
    nodes = list(ast.walk(ast.parse(text)))
    left_out = {number for number, line in enumerate(text.splitlines(), 1) if not line.strip()}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            left_out |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return [(node.name, len({*range(node.lineno, node.end_lineno + 1)} - left_out)) for node in functions]


@pytest.mark.parametrize("path", MODULES.values(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_have_at_most_50_lines(path):
    assert [(name, count) for name, count in lines_of_code(path) if count > 50] == []


def test_the_lines_of_a_function_are_counted_with_those_of_its_inner_functions(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        'def f(x):\n    """One.\n\n    Two.\n    """\n\n    def g():\n        return x\n\n    return g\n'
    )
    assert lines_of_code(path) == [("f", 4), ("g", 2)]
