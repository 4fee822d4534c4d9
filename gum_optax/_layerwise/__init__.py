"""A training step that takes one layer after the other."""
