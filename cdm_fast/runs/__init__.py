"""Run directories: building models from a config, writing and reading checkpoints, calibration."""
