"""Rows of the parity tests: one file per method, found by themselves. A row is a config of peft on a small model."""

import importlib
import pkgutil

from rows.row import MODELS, Row

_FOUND = [importlib.import_module(f"rows.{m.name}") for m in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name)]
ROWS = [row for module in _FOUND for row in getattr(module, "ROWS", ())]
#: Methods that have no row, and the file of the test that stands for it.
ELSEWHERE = {name: file for module in _FOUND for name, file in getattr(module, "ELSEWHERE", {}).items()}

__all__ = ["ELSEWHERE", "MODELS", "ROWS", "Row"]
