"""Training without a backward pass: slopes along random directions."""
