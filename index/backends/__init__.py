"""Search backends: one Protocol, several ways to find the nearest vectors of one table."""
