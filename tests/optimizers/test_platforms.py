"""The code that other platforms get takes the steps that a CPU takes."""

import inspect

import chex
import jax
import pytest

import gum_optax as go

from helpers import AMPLIFIED, CORE_AND_LONG, OPTIMIZERS, run, trees


@pytest.fixture
def compiled_for(monkeypatch):
    """A function that makes every choice between platforms for the one that it is given."""

    def choose(platform):
        def chosen(*operands, default=None, **by_platform):
            return by_platform.get(platform, default)(*operands)

        jax.clear_caches()  # what was traced before has chosen otherwise
        monkeypatch.setattr(jax.lax, "platform_dependent", chosen)

    yield choose
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("name", CORE_AND_LONG)
def test_the_code_for_a_gpu_and_for_a_tpu_takes_the_same_steps_on_a_cpu(name, leaves, compiled_for):
    """Over two refreshes, on stacks and single matrices of both orientations."""
    make, arguments = OPTIMIZERS[name]
    if "orthogonalizer" in inspect.signature(make).parameters:
        # The default is the Gram form on a CPU alone.
        arguments = arguments | {"orthogonalizer": go.newton_schulz}
    gradients = trees(leaves)[:5]

    def steps():
        return run(make(0.1, **arguments), gradients)[0]

    expected = steps()
    for platform in ("cuda", "tpu"):
        compiled_for(platform)
        chex.assert_trees_all_close(steps(), expected, atol=AMPLIFIED)
