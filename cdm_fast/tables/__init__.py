"""Tables of numbers: their densities, density ratios and mutual information, as scikit-learn estimators."""
