"""The optimisation inside one edit."""
