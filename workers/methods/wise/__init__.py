"""WISE: side memories of one layer, with routing and merging."""
