"""Requests, checked before any expensive work starts."""
