"""Caches to and from other formats and the hub."""
