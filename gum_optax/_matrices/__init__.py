"""A model's leaves seen as matrices: the only folder that knows models."""
