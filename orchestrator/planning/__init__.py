"""Planning: from a spec to cells, shards and steps. Runs nothing."""
