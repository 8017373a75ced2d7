"""Measurements: scripts, campaigns (`chaos`), their results, and the tables made of them. Needs a checkout."""
