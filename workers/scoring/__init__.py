"""Scoring: probes, a model's replies, and the scores computed from them."""
