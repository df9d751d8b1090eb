"""Storage of results: one interface, on a local disk or in a bucket."""
