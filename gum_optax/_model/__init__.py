"""What is known of a model's leaves: the only folder that knows the names and layouts of model libraries."""
