"""Engines: they run a plan's shards and gather their rows."""
