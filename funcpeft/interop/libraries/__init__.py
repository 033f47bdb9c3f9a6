"""The registry of quantization libraries: one import per line, sorted, no logic."""

from funcpeft.interop.libraries.aqlm import AQLM
from funcpeft.interop.libraries.awq import AWQ
from funcpeft.interop.libraries.bitnet import BitNet
from funcpeft.interop.libraries.bitsandbytes import BitsAndBytes
from funcpeft.interop.libraries.compressed import CompressedTensors
from funcpeft.interop.libraries.eetq import EETQ
from funcpeft.interop.libraries.finefp8 import FineGrainedFP8
from funcpeft.interop.libraries.gptq import GPTQ
from funcpeft.interop.libraries.hqq import HQQ
from funcpeft.interop.libraries.inc import INC
from funcpeft.interop.libraries.quanto import Quanto
from funcpeft.interop.libraries.torchao import TorchAO

__all__ = [
    "AQLM",
    "AWQ",
    "EETQ",
    "GPTQ",
    "HQQ",
    "INC",
    "BitNet",
    "BitsAndBytes",
    "CompressedTensors",
    "FineGrainedFP8",
    "Quanto",
    "TorchAO",
]
