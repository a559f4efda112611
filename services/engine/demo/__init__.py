"""The demo pair, a target and a draft for it, trained on Python's standard library by train.py."""
