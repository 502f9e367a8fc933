"""Training: an objective, an optimizer, a state and its step, a loop around it."""
