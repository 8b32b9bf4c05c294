"""Training runs: `train.train` and `train.resume`, and what they consist of."""
