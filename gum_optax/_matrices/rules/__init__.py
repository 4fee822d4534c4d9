"""The rules of the policy: what is known of the leaves of a model."""
