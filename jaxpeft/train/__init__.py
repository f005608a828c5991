"""Training: pure functions (state, step, loss), then one loop around them."""
