"""funcpeft: parameter-efficient fine-tuning as pure functions of trees, on torch.func.

A model is a pure function, an adapter is a tree of tensors, and everything that fine-tuning does to them is a pure function of
trees. The public names, re-exported; nothing is computed here.
"""

from funcpeft import optim, testing, train
from funcpeft.adapt import Net, adapt, peft_init
from funcpeft.context import Context
from funcpeft.errors import CannotRequantizeError, CheckpointError, LostUpdateError, NoMatchError, NoMergedFormError
from funcpeft.functional import Model
from funcpeft.gradients import accumulate, value_and_grad
from funcpeft.interop.modules import functionalize
from funcpeft.interop.options import choose_format
from funcpeft.interop.peft import load_peft, save_peft
from funcpeft.interop.trainer import AdapterModule, to_module
from funcpeft.interop.transformers import load_pretrained
from funcpeft.interop.writing import write_quantized
from funcpeft.kbit import prepare_kbit
from funcpeft.loftq import loftq
from funcpeft.merging import MergeReport
from funcpeft.method import Additive, Method
from funcpeft.methods import (
    BEFT,
    BOFT,
    C3A,
    DEFT,
    HRA,
    IA3,
    OFT,
    OSF,
    PSOFT,
    AdaLoRA,
    AdaMSS,
    Arrow,
    BDLoRA,
    DeLoRA,
    DoRA,
    FourierFT,
    FRoD,
    Full,
    GLoRA,
    GraLoRA,
    HiRA,
    KaSA,
    Lily,
    LNTuning,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    MonteCLoRA,
    PEANuT,
    Poly,
    PrefixTuning,
    PromptTuning,
    PVeRA,
    QALoRA,
    RandLoRA,
    RoAd,
    Shadow,
    SHiRA,
    SuperTuning,
    TinyLoRA,
    TrainableTokens,
    UniLoRA,
    VBLoRA,
    VeLoRA,
    VeRA,
    WaveFT,
    XLoRA,
    aLoRA,
)
from funcpeft.perexample import clipped_grads, per_example_grads, per_example_norms
from funcpeft.population import PopulationWarning, apply_many, plan_many
from funcpeft.quant import FP4, FP8, MXFP4, MXFP8, NF4, NVFP4, AffineInt, Codebook, Dense, Int8, Ternary, TorchAONF4
from funcpeft.quant.format import Format
from funcpeft.quantization import QuantizationReport, dequantize, quantization_report, quantize, to
from funcpeft.remat import remat
from funcpeft.replication import replicate_layers
from funcpeft.routing import apply_routed
from funcpeft.stacking import select, stack, unstack
from funcpeft.statistics import calibrate, weight_gradients
from funcpeft.storage import Quantized
from funcpeft.tree import Adapter
from funcpeft.weights import Base

__version__ = "0.1.0"

__all__ = [
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "FP4",
    "FP8",
    "HRA",
    "IA3",
    "MXFP4",
    "MXFP8",
    "NF4",
    "NVFP4",
    "OFT",
    "OSF",
    "PSOFT",
    "AdaLoRA",
    "AdaMSS",
    "Adapter",
    "AdapterModule",
    "Additive",
    "AffineInt",
    "Arrow",
    "BDLoRA",
    "Base",
    "CannotRequantizeError",
    "CheckpointError",
    "Codebook",
    "Context",
    "DeLoRA",
    "Dense",
    "DoRA",
    "FRoD",
    "Format",
    "FourierFT",
    "Full",
    "GLoRA",
    "GraLoRA",
    "HiRA",
    "Int8",
    "KaSA",
    "LNTuning",
    "Lily",
    "LoHa",
    "LoKr",
    "LoRA",
    "LostUpdateError",
    "MergeReport",
    "Method",
    "MiSS",
    "Model",
    "MonteCLoRA",
    "Net",
    "NoMatchError",
    "NoMergedFormError",
    "PEANuT",
    "PVeRA",
    "Poly",
    "PopulationWarning",
    "PrefixTuning",
    "PromptTuning",
    "QALoRA",
    "QuantizationReport",
    "Quantized",
    "RandLoRA",
    "RoAd",
    "SHiRA",
    "Shadow",
    "SuperTuning",
    "Ternary",
    "TinyLoRA",
    "TorchAONF4",
    "TrainableTokens",
    "UniLoRA",
    "VBLoRA",
    "VeLoRA",
    "VeRA",
    "WaveFT",
    "XLoRA",
    "aLoRA",
    "accumulate",
    "adapt",
    "apply_many",
    "apply_routed",
    "calibrate",
    "choose_format",
    "clipped_grads",
    "dequantize",
    "functionalize",
    "load_peft",
    "load_pretrained",
    "loftq",
    "optim",
    "peft_init",
    "per_example_grads",
    "per_example_norms",
    "plan_many",
    "prepare_kbit",
    "quantization_report",
    "quantize",
    "remat",
    "replicate_layers",
    "save_peft",
    "select",
    "stack",
    "testing",
    "to",
    "to_module",
    "train",
    "unstack",
    "value_and_grad",
    "weight_gradients",
    "write_quantized",
]
