"""Functions of arrays: no trees, no optax."""
