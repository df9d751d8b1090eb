"""WISE: side memories beside one layer, with routing and merging."""
