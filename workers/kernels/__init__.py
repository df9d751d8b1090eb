"""Faster kernels with the same numbers up to rounding. No result depends on their being used."""
