"""The plan of the package: which folder may import which, and how long a module may be.

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
