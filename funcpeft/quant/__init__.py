"""The registry of formats: one import per line, sorted, no logic. A new format is its file and its line here."""

from funcpeft.quant.int8 import Int8
from funcpeft.quant.nf4 import NF4

__all__ = ["NF4", "Int8"]
