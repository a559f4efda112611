"""The demo pair, a target and a draft for it, trained on Python's standard library by train.py. Imports no torch."""

from pathlib import Path

TARGET_DIR = Path(__file__).parent / "target"
