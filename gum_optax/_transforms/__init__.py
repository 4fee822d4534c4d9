"""Rules over full matrices."""
