"""The application over the tiny model and a small index."""

from serving import client, engine, galaxy, index_dir, settings, spectrum  # noqa: F401
