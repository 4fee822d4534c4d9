"""The same key gives the same bits: in every program, in every process, and after a resume."""

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gum_optax as go

from helpers import AMPLIFIED, CORE_AND_LONG, OPTIMIZERS

PERIOD = 3  # of `helpers.OPTIMIZERS`
GRADIENTS = [
    {
        "stack": np.float32(np.random.default_rng(seed).normal(size=(5, 4, 6))),
        "bias": np.float32(np.random.default_rng(seed).normal(size=4)),
    }
    for seed in range(2 * PERIOD + 1)
]


@functools.cache
def optimizer(name, key=0):
    make, arguments = OPTIMIZERS[name]
    return make(0.1, **arguments | ({"key": key} if key else {}))


@functools.cache
def jitted(name, key=0):
    return jax.jit(optimizer(name, key).update)


def trajectory(update, state, gradients=GRADIENTS):
    """Parameters and state after each step."""
    params, found = jax.tree.map(np.zeros_like, GRADIENTS[0]), []
    for g in gradients:
        steps, state = update(g, state, params)
        params = jax.tree.map(np.add, params, steps)
        found.append((params, state))
    return found


def integers(state):
    """Counts, keys and draws, which rounding cannot change."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    found = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    return {path: x for path, x in found.items() if np.issubdtype(x.dtype, np.integer)}


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name != "gum")) for name in OPTIMIZERS]
)
def test_op_by_op_the_draws_are_those_of_jit_and_the_rest_is_its_rounding(name):
    """Fusion contracts `a * b + c` to one rounding, so programs differ, as do optax.adamw's moments."""
    tx = optimizer(name)
    eager = trajectory(tx.update, tx.init(GRADIENTS[0]), GRADIENTS[: PERIOD + 1])
    compiled = trajectory(jitted(name), jax.jit(tx.init)(GRADIENTS[0]), GRADIENTS[: PERIOD + 1])
    for (params, state), (expected, reference) in zip(eager, compiled, strict=True):
        assert_same_bits(integers(state), integers(reference))
        for path, x in params.items():
            np.testing.assert_allclose(x, expected[path], atol=AMPLIFIED)


@pytest.mark.parametrize("name", CORE_AND_LONG)
def test_resumed_after_any_step_it_goes_on_to_the_bit(name):
    whole = trajectory(jitted(name), optimizer(name).init(GRADIENTS[0]))
    for step, (params, state) in enumerate(whole[:-1], start=1):
        fresh = optimizer(name).init(GRADIENTS[0])
        restored = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
        for g, expected in zip(GRADIENTS[step:], whole[step:], strict=True):
            steps, restored = jitted(name)(g, restored, params)
            params = jax.tree.map(np.add, params, steps)
            assert_same_bits((params, restored), expected)


def digest(name, key=0):
    """A hash of the bits of a run."""
    last = trajectory(jitted(name, key), optimizer(name, key).init(GRADIENTS[0]))[-1]
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(last))).hexdigest()


def test_processes_agree_to_the_bit_whatever_seeds_their_hashes():
    """The hash of a name, such as a leaf's path, must be the same in every process."""
    code = "import test_determinism as t; print(t.digest('gum'), t.digest('gum', 1))"
    here = Path(__file__).resolve().parent
    found = []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], cwd=here, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    same, other = found[0]
    assert found == [[same, other]] * 2
    assert same == digest("gum")
    assert same != other  # another key draws other blocks


def test_the_draw_is_the_same_in_a_loop_a_vmap_and_a_scan():
    key = jax.random.key_data(jax.random.key(3))

    def drawn(period):
        return go.draw(key, period, "4x6", 16, 4)

    periods = jnp.arange(5)
    expected = [np.asarray(drawn(period)) for period in periods]
    assert len({tuple(x) for x in expected}) > 1
    _, scanned = jax.lax.scan(lambda carry, period: (carry, drawn(period)), 0, periods)
    np.testing.assert_array_equal(jax.vmap(drawn)(periods), expected)
    np.testing.assert_array_equal(scanned, expected)
