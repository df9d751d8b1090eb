"""Artifacts: what is computed once and shared, and the builders."""
