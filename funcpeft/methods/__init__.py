"""The registry of methods: one import per line, sorted, no logic. A new method is its file and its line here."""

from funcpeft.methods.full import Full
from funcpeft.methods.lora import LoRA
from funcpeft.methods.trainabletokens import TrainableTokens

__all__ = ["Full", "LoRA", "TrainableTokens"]
