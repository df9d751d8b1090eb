"""Engines: they run a plan's shards and gather the rows."""
