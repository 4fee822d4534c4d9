"""optax's own suites, unchanged from its wheel, over every optimizer of this library.

They use 2 × 2 matrices and vectors, so other tests cover low rank. By default only GUM runs;
`pytest -n 2 -m long tests/optimizers/test_optax_suites.py` runs all others.
"""

import functools
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

from helpers import OPTIMIZERS

if optax.__version__ < "0.2.8":
    pytest.skip("the suites of an older optax ask other things in other ways", allow_module_level=True)

contrib = importlib.import_module("optax.contrib._common_test")
alias = importlib.import_module("optax._src.alias_test")
accumulation = importlib.import_module("optax.transforms._accumulation_test")
SUITES = {contrib: "ContribTest", alias: "AliasTest", accumulation: "AccumulationTest"}

# Scion's steps have the size of its balls, up to 3000.
RATES = {"scion": 1e-4}
REAL = ("scion", "adalomo")
REFUSES = "its rules for embeddings and vectors are for real numbers, so it refuses complex ones"

every_optimizer = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name != "gum")) for name in OPTIMIZERS]
)


def factory_of(name):
    """The optimizer as the suites call it: a function of the learning rate, and of the rank if it has one."""
    make, arguments = OPTIMIZERS[name]

    def plain(learning_rate: optax.ScalarOrSchedule):
        return make(learning_rate, **arguments)

    def ranked(learning_rate: optax.ScalarOrSchedule, rank: int = 1):
        return make(learning_rate, **(arguments | {"rank": rank}))

    return ranked if "rank" in arguments else plain


@pytest.fixture(autouse=True)
def _known_to_optax(monkeypatch):
    for name in OPTIMIZERS:
        monkeypatch.setattr(optax.contrib, f"ours_{name}", factory_of(name), raising=False)
        monkeypatch.setattr(alias.alias, f"ours_{name}", factory_of(name), raising=False)


def run(suite, test, name, **arguments):
    """One test function of a suite, without the decorators that parametrize it by optax's optimizers."""
    holder = getattr(suite, SUITES[suite])
    case = inspect.unwrap(getattr(holder, f"{test}0"))
    unwrapped = {"wrapper_name": None, "wrapper_kwargs": None}
    taken = {key: x for key, x in unwrapped.items() if key in inspect.signature(case).parameters}
    rate = RATES.get(name, 1e-2)
    case(holder(), opt_name=f"ours_{name}", opt_kwargs={"learning_rate": rate}, **taken, **arguments)


contrib_test, alias_test = functools.partial(run, contrib), functools.partial(run, alias)
TARGETS = ("parabola", "rosenbrock", "matrix_parabola", "mixed_tensor_target")


@every_optimizer
@pytest.mark.parametrize("target", TARGETS)
def test_it_optimizes_as_optax_contrib_asks(name, target):
    if name == "swan" and target in TARGETS[2:]:
        pytest.skip("SWAN's standardized rows have mean zero: the mean of a matrix's row never moves")
    contrib_test("test_optimizers", name, target=getattr(contrib, f"_setup_{target}"), dtype="float32")


@every_optimizer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
@pytest.mark.parametrize("target", TARGETS[:2])
def test_it_optimizes_as_optax_alias_asks(name, dtype, target):
    if name in REAL and dtype == jnp.complex64:
        pytest.skip(REFUSES)
    alias_test("test_optimization", name, target=getattr(alias, f"_setup_{target}"), dtype=dtype)


@every_optimizer
@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        ("test_optimizers_can_be_wrapped_in_inject_hyperparams", {}),
        ("test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such", {}),
        ("test_optimizers_accept_extra_args", {"wrap": False}),
    ],
    ids=["inject_hyperparams", "schedule", "extra_args"],
)
def test_it_is_wrapped_and_called_as_optax_does(name, test, arguments):
    contrib_test(test, name, **arguments)


@every_optimizer
@pytest.mark.parametrize("suite", [contrib, alias], ids=["contrib", "alias"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("test", ["test_preserve_dtype", "test_gradient_accumulation"])
def test_dtypes_are_kept(name, suite, dtype, test):
    run(suite, test, name, dtype=dtype)


@every_optimizer
@pytest.mark.parametrize(
    ("suite", "dtype"),
    [(contrib, x) for x in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)]
    + [(alias, x) for x in (jnp.complex64, jnp.complex128)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_state_keeps_its_types(name, suite, dtype):
    if name in REAL and suite is alias:
        pytest.skip(REFUSES)
    run(suite, "test_state_shape_dtype_shard_stability", name, dtype=dtype)


@pytest.mark.long  # the contract tests hold dtypes and `optax.MultiSteps` one by one
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dtypes_of_gradients_and_parameters_may_differ_under_multi_steps(name):
    run(accumulation, "test_multi_steps_mixed_precision", name)


@pytest.mark.parametrize(
    "names",
    [["gum"], pytest.param([name for name in OPTIMIZERS if name != "gum"], marks=pytest.mark.long)],
    ids=["gum", "others"],
)
def test_types_carry_shardings_on_explicit_axes(names):
    command = [sys.executable, "optax_sharding_suite.py", *names]
    here = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=here, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2 * 3 * len(names)
