"""The registry of methods: one import per line, sorted, no logic. A new method is its file and its line here."""

from funcpeft.methods.dora import DoRA
from funcpeft.methods.fourierft import FourierFT
from funcpeft.methods.full import Full
from funcpeft.methods.ia3 import IA3
from funcpeft.methods.lntuning import LNTuning
from funcpeft.methods.lora import LoRA
from funcpeft.methods.trainabletokens import TrainableTokens
from funcpeft.methods.vera import VeRA

__all__ = ["IA3", "DoRA", "FourierFT", "Full", "LNTuning", "LoRA", "TrainableTokens", "VeRA"]
