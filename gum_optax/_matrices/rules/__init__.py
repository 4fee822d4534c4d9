"""The rules of the policy, which read the leaves of a model."""
