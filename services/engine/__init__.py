"""The engine: one model, many requests, one process."""
