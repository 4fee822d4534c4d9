"""One import for each trainer that has to be told of an optimizer.

Neither module is imported by `gum_optax`: each needs its trainer's package, which this library does not.
"""
