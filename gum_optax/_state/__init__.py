"""What can be said of an optimizer's state."""
