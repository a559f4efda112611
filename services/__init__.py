"""Baton's services and the libraries they share; see README.md for the map."""
