"""Run directories: what a training run leaves, and reading it back."""
