"""The demo model, trained on Python's standard library by train.py, which also trains a draft for it."""
