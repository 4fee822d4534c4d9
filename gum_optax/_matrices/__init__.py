"""Views a model's leaves as matrices. No other folder knows about models."""
