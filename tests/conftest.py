import importlib.metadata
import os
from pathlib import Path

# Tests are tiny: compilation dominates, so LLVM's optimizations are off; XLA's own, which decide the
# buffers that the memory tests look at, are on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of LAPACK spin for a while after each call, on the cores that XLA goes on with.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Kernels by way of LLVM alone and not of MLIR, where jaxlib knows the flag: compiled in half the time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith(("0.9.", "0.10.")),
)

# Compiled programs are shared by the workers and kept for the next run (`pytest --cache-clear` forgets them).
# Reading them, jaxlib 0.9 hangs now and then.
if not importlib.metadata.version("jaxlib").startswith("0.9."):
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "d" / "jax")
    )
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import numpy as np
import pytest

from helpers import LEAVES, STEPS, sequence

# A failing example must fail again: derandomized. Compilation makes single examples slow.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def leaves():
    """The gradients of a run: for each name of `LEAVES` one array for each step."""
    rng = np.random.default_rng(1)
    return {name: sequence(rng, shape, STEPS) for name, shape in LEAVES.items()}


@pytest.fixture(autouse=True, scope="module")
def _no_float64():
    """The suite runs as users run JAX: float32."""
    assert not jax.config.jax_enable_x64


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
    """Thousands of compiled programs would use up the memory maps that Linux grants a process (65,530)."""
    yield
    jax.clear_caches()
