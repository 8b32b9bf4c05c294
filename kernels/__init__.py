"""Triton kernels and their launchers, one file per op (installed as cdm_fast.kernels)."""
