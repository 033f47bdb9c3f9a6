"""Rows of the parity tests: one file per method, found by themselves. A row is a config of peft on a small model."""

import importlib
import pkgutil

from rows.row import MODELS, Row

ROWS = [
    row
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name)
    for row in getattr(importlib.import_module(f"rows.{found.name}"), "ROWS", ())
]

__all__ = ["MODELS", "ROWS", "Row"]
