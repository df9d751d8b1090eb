"""Artifacts: tensors that are computed once and shared, and their builders."""
