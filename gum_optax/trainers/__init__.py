"""One module for each trainer that selects optimizers by name.

`gum_optax` imports neither module: each needs the package of its trainer, which this library does not need.
"""
