"""Every public name has an example that runs."""

import ast
import doctest
import functools
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax

PACKAGE = Path(gum_optax.__file__).parent
# What the examples take as imported.
NAMES = {"gum_optax": gum_optax, "jax": jax, "jnp": jnp, "np": np, "optax": optax}
# The module of each name that the package imports, `from .module import name as name`.
MODULES = {
    alias.asname: PACKAGE / f"{node.module.replace('.', '/')}.py"
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
    if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    for alias in node.names
}
PUBLIC = [name for name, x in vars(gum_optax).items() if name[0] != "_" and not inspect.ismodule(x)]


def targets(node):
    """The names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    found = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [x.id for x in found if isinstance(x, ast.Name)]


@functools.cache
def docstrings(path):
    """The docstring of each name of a module; that of a constant is the string below it."""
    found = {}
    body = ast.parse(path.read_text()).body
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = ast.get_docstring(node)
        else:
            value = getattr(below, "value", None) if isinstance(below, ast.Expr) else None
            is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
            text = inspect.cleandoc(value.value) if is_text else None
        found |= dict.fromkeys(targets(node), text or "")
    return found


def section(text):
    """The section `Examples:` of a docstring; no section but the references follows it."""
    found = re.search(r"^Examples:\n((?:  .*\n?)+)(?:\Z|\nReferences:\n)", text, re.MULTILINE)
    return found[1] if found else ""


def failures(text, name):
    """What doctest reports of the examples in a text; "..." stands for any rest of an output."""
    report: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, dict(NAMES), name, None, 0)
    doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    return "".join(report)


def test_the_public_names_are_those_that_the_package_imports():
    assert set(PUBLIC) == set(MODULES)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example_that_runs(name):
    text = docstrings(MODULES[name])[name]
    assert text.partition("\n")[0].strip(), "there is no docstring"
    assert ">>> " in section(text), "the docstring has no section Examples before its references"
    report = failures(text, name)
    assert not report, report


@pytest.mark.parametrize(
    "text",
    [
        *("A sum.", "A sum.\n\nExamples:\n  See elsewhere.\n", "A sum.\n\n  >>> 1 + 1\n  2\n"),
        "A sum.\n\nExamples:\n  >>> 1 + 1\n  2\n\nRaises:\n  ValueError: never.\n",
    ],
)
def test_a_docstring_without_a_section_of_examples_is_found(text):
    assert ">>> " not in section(text)


def test_an_example_with_another_result_is_found():
    assert not failures(">>> int(jnp.ones(2).sum())\n2\n", "sum")
    assert "Expected:\n    3\nGot:\n    2" in failures(">>> int(jnp.ones(2).sum())\n3\n", "sum")
