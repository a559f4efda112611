"""The demo pair: a small target and a tiny draft, trained on Python's standard library by train.py."""
