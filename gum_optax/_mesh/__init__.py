"""Shardings: where the arrays of the state and of the optimizer's computations live."""
