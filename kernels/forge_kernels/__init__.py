"""Implementations behind :mod:`forge_harness.kernels`; import that façade instead."""
