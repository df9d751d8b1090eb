"""The base model, batches, overlays and replay."""
