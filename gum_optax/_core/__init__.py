"""The ground: checks, trees, keys, the context of an update, and what is done for the compiler's sake."""
