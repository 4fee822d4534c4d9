"""optax's sharding suite on eight host devices: `test_optax_suites.py` runs this in a separate process.

python tests/optax_sharding_suite.py NAME ...      prints each test that passed
"""

import importlib
import inspect
import os
import sys

import jax

from helpers import OPTIMIZERS

# The suite replaces the flags by one for eight devices.
flags = os.environ.get("XLA_FLAGS", "")
suite = importlib.import_module("optax._src.sharding_test")
os.environ["XLA_FLAGS"] += f" {flags}"

# The suite compares versions as strings: it would take 0.10 to be older than 0.7.2 and skip itself.
jax.__version__ = "9"

for name in sys.argv[1:]:
    make, arguments = OPTIMIZERS[name]
    for test in (
        "test_init_with_abstract_input",
        "test_state_sharding_type_init_match_update",
        "test_state_sharding_type_preserved_with_jit",
    ):
        case = inspect.unwrap(getattr(suite.ShardingTest, f"{test}_adam"))
        case(suite.ShardingTest(), optimizer=make(1.0, **arguments))
        print(name, test)
