import os

# Tests are tiny: compilation dominates, so LLVM's optimizations are off; XLA's own, which decide the
# buffers that the memory tests look at, are on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import hypothesis
import jax
import numpy as np
import pytest

# A failing example must fail again: derandomized. Compilation makes single examples slow.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def _no_float64():
    """The suite runs as users run JAX: float32."""
    assert not jax.config.jax_enable_x64
