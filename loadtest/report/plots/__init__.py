"""Plots of a result: each file here one question. Every axis says its unit; a plot that would be empty is not made."""
