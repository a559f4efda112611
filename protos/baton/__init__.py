"""Baton's protocols by version."""
