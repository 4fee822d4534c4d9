"""The ground: checks, trees, keys, guards, and workarounds for the compiler."""
