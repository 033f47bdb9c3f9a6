"""The registry of formats: one import per line, sorted, no logic. A new format is its file and its line here."""

from funcpeft.quant.affineint import AffineInt
from funcpeft.quant.codebook import Codebook
from funcpeft.quant.dense import Dense
from funcpeft.quant.fp4 import FP4
from funcpeft.quant.fp8 import FP8
from funcpeft.quant.int8 import Int8
from funcpeft.quant.mxfp4 import MXFP4
from funcpeft.quant.mxfp8 import MXFP8
from funcpeft.quant.nf4 import NF4
from funcpeft.quant.nvfp4 import NVFP4
from funcpeft.quant.ternary import Ternary
from funcpeft.quant.torchaonf4 import TorchAONF4

__all__ = ["FP4", "FP8", "MXFP4", "MXFP8", "NF4", "NVFP4", "AffineInt", "Codebook", "Dense", "Int8", "Ternary", "TorchAONF4"]
