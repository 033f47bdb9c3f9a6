"""The registry of methods: one import per line, sorted, no logic. A new method is its file and its line here."""

from funcpeft.methods.adalora import AdaLoRA
from funcpeft.methods.adamss import AdaMSS
from funcpeft.methods.alora import aLoRA
from funcpeft.methods.arrow import Arrow
from funcpeft.methods.bdlora import BDLoRA
from funcpeft.methods.beft import BEFT
from funcpeft.methods.boft import BOFT
from funcpeft.methods.c3a import C3A
from funcpeft.methods.deft import DEFT
from funcpeft.methods.delora import DeLoRA
from funcpeft.methods.dora import DoRA
from funcpeft.methods.fourierft import FourierFT
from funcpeft.methods.frod import FRoD
from funcpeft.methods.full import Full
from funcpeft.methods.glora import GLoRA
from funcpeft.methods.gralora import GraLoRA
from funcpeft.methods.hira import HiRA
from funcpeft.methods.hra import HRA
from funcpeft.methods.ia3 import IA3
from funcpeft.methods.kasa import KaSA
from funcpeft.methods.lily import Lily
from funcpeft.methods.lntuning import LNTuning
from funcpeft.methods.loha import LoHa
from funcpeft.methods.lokr import LoKr
from funcpeft.methods.lora import LoRA
from funcpeft.methods.miss import MiSS
from funcpeft.methods.monteclora import MonteCLoRA
from funcpeft.methods.oft import OFT
from funcpeft.methods.osf import OSF
from funcpeft.methods.peanut import PEANuT
from funcpeft.methods.poly import Poly
from funcpeft.methods.prefixtuning import PrefixTuning
from funcpeft.methods.prompttuning import PromptTuning
from funcpeft.methods.psoft import PSOFT
from funcpeft.methods.pvera import PVeRA
from funcpeft.methods.qalora import QALoRA
from funcpeft.methods.randlora import RandLoRA
from funcpeft.methods.road import RoAd
from funcpeft.methods.shadow import Shadow
from funcpeft.methods.shira import SHiRA
from funcpeft.methods.supertuning import SuperTuning
from funcpeft.methods.tinylora import TinyLoRA
from funcpeft.methods.trainabletokens import TrainableTokens
from funcpeft.methods.unilora import UniLoRA
from funcpeft.methods.vblora import VBLoRA
from funcpeft.methods.velora import VeLoRA
from funcpeft.methods.vera import VeRA
from funcpeft.methods.waveft import WaveFT
from funcpeft.methods.xlora import XLoRA

__all__ = [
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "HRA",
    "IA3",
    "OFT",
    "OSF",
    "PSOFT",
    "AdaLoRA",
    "AdaMSS",
    "Arrow",
    "BDLoRA",
    "DeLoRA",
    "DoRA",
    "FRoD",
    "FourierFT",
    "Full",
    "GLoRA",
    "GraLoRA",
    "HiRA",
    "KaSA",
    "LNTuning",
    "Lily",
    "LoHa",
    "LoKr",
    "LoRA",
    "MiSS",
    "MonteCLoRA",
    "PEANuT",
    "PVeRA",
    "Poly",
    "PrefixTuning",
    "PromptTuning",
    "QALoRA",
    "RandLoRA",
    "RoAd",
    "SHiRA",
    "Shadow",
    "SuperTuning",
    "TinyLoRA",
    "TrainableTokens",
    "UniLoRA",
    "VBLoRA",
    "VeLoRA",
    "VeRA",
    "WaveFT",
    "XLoRA",
    "aLoRA",
]
