import importlib.metadata
import os
import signal
from pathlib import Path

# Tests are tiny and compilation dominates, so LLVM's optimizations are off. XLA's own optimizations are on:
# they decide the buffers that the memory tests measure.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of LAPACK spin for a while after each call, on cores that XLA needs.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Emit kernels without MLIR, where jaxlib knows the flag: this halves the compile time. One LLVM module
# is enough, because each worker has one core.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * importlib.metadata.version("jaxlib").startswith(("0.9.", "0.10.")),
)

# The workers share compiled programs and keep them for the next run (`pytest --cache-clear` deletes them).
# jaxlib 0.9 sometimes hangs when it reads them.
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

# Derandomize, so that a failing example fails again. No deadline: compilation makes some examples slow.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def leaves():
    """The gradients of a run: for each name in `LEAVES`, one array per step."""
    rng = np.random.default_rng(1)
    return {name: sequence(rng, shape, STEPS) for name, shape in LEAVES.items()}


@pytest.fixture(autouse=True, scope="module")
def _no_float64():
    """The suite runs in float32, as users run JAX."""
    assert not jax.config.jax_enable_x64


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
    """Drop compiled programs: thousands would exhaust the memory maps of a Linux process (65,530)."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A separate cache for the examples' runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def example_environment(cache, monkeypatch):
    """The separate cache and no progress bar; restores the signal handlers afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
