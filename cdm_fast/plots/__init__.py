"""Plots as PNG files, drawn by matplotlib without a display."""
