"""A rule in a subspace."""
