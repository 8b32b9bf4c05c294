"""Training runs: `train.train` and `train.resume`, and their parts."""
