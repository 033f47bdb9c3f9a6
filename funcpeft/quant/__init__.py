"""The registry of formats: one import per line, sorted, no logic. A new format is its file and its line here."""

from funcpeft.quant.dense import Dense
from funcpeft.quant.fp4 import FP4
from funcpeft.quant.int8 import Int8
from funcpeft.quant.nf4 import NF4

__all__ = ["FP4", "NF4", "Dense", "Int8"]
