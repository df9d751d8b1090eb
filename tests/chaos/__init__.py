"""Breaks sweeps on purpose and counts what the table lost (``make chaos``)."""
