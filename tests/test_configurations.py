"""The configurations of trainers, as far as they need no trainer; `test_trainers.py` has the rest."""

import ast
import functools
import inspect
from pathlib import Path

import pytest

import gum_optax as go
from gum_optax.trainers._decay import decay_arguments

from helpers import OPTIMIZERS

LEVANTER = Path(__file__).resolve().parent.parent / "gum_optax" / "trainers" / "levanter.py"


def optimizers():
    """The public functions of `_optimizers` that take a learning rate first."""
    functions = {name: x for name in dir(go) if inspect.isfunction(x := getattr(go, name))}
    own = {name: x for name, x in functions.items() if x.__module__.startswith("gum_optax._optimizers.")}
    return {name for name, x in own.items() if next(iter(inspect.signature(x).parameters)) == "learning_rate"}


def test_levanter_has_a_configuration_of_every_optimizer():
    """Levanter is not there, so the test reads the module: `GumConfig = config_of(gum_optax.gum)`."""
    found = {}
    for node in ast.parse(LEVANTER.read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            found[node.value.args[0].attr] = node.target.id
    assert set(found) == optimizers()
    assert set(found) >= set(OPTIMIZERS)
    for name, target in found.items():
        assert target == "".join(word.capitalize() for word in name.split("_")) + "Config"


def test_an_optimizer_gets_the_mask_of_a_trainer_where_it_takes_one():
    def mask(params):
        return params

    both = {"weight_decay": 0.1, "weight_decay_mask": mask}
    of_any_arguments = lambda rate, **arguments: arguments  # noqa: E731
    for optimizer in (go.gum, functools.partial(go.hfac, b1=0.5), of_any_arguments):
        assert decay_arguments(optimizer, 0.1, mask, "") == both
    assert decay_arguments(go.adalomo, 0.1, None, "") == {"weight_decay": 0.1}
    assert decay_arguments(go.adalomo, 0.0, mask, "") == {"weight_decay": 0.0}  # nothing decays


def test_a_mask_that_an_optimizer_cannot_take_is_refused_with_the_way_out():
    for optimizer in (go.adalomo, functools.partial(go.adalomo, threshold=2.0)):
        with pytest.raises(
            ValueError, match=r"adalomo .* weight_decay=0.1 .* no weight_decay_mask: do this\."
        ):
            decay_arguments(optimizer, 0.1, lambda params: params, "do this")
