"""Evaluation of models beyond likelihood: classification, robustness, outliers, sample quality."""
