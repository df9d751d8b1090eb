"""Storage of results: a few verbs, on a local disk or in a bucket."""
