"""Training runs, from their preparation to their last picture."""
