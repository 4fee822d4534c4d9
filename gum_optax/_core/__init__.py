"""The ground: checks, trees, keys, guards, and what is done for the compiler's sake."""
