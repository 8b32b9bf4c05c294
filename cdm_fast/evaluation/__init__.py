"""Evaluation of models besides their likelihood: classification, robustness, outliers, sample quality."""
