"""The structured option for a quantized base: every backend's formats, and every contradiction with its remedy."""

import json
import re

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig

from funcpeft.interop import options
from funcpeft.interop.options import choose_format
from funcpeft.quant import NF4, AffineInt, Int8
from funcpeft.quant.fp4 import FP4
from funcpeft.quant.fp8 import FP8
from funcpeft.quant.mxfp4 import MXFP4
from funcpeft.quant.mxfp8 import MXFP8
from funcpeft.quant.nvfp4 import NVFP4
from funcpeft.quant.ternary import Ternary

MEANT = [
    ({"backend": "bnb", "weight_dtype": "nf4"}, NF4()),
    (
        {"backend": "bnb", "weight_dtype": "nf4", "double_quant": True, "group_size": 128},
        NF4(block_size=128, double_quant=True),
    ),
    ({"backend": "bitsandbytes", "weight_dtype": "FP4", "double_quant": True}, FP4(double_quant=True)),
    ({"backend": "bnb", "weight_dtype": "fp4", "group_size": 32, "double_quant": False}, FP4(block_size=32)),
    ({"backend": "bnb", "weight_dtype": "int8"}, Int8()),
    ({"bnb": {"weight_dtype": "nf4", "double_quant": True}}, NF4(double_quant=True)),
    ({"backend": "torchao", "weight_dtype": "int8"}, AffineInt(bits=8, block_size="row", packing="int8")),
    ({"backend": "torchao", "weight_dtype": torch.int8, "group_size": 32}, AffineInt(bits=8, block_size=32, packing="int8")),
    ({"torchao": {"weight_dtype": "int4", "group_size": 64}}, AffineInt(bits=4, block_size=64, packing="int8")),
    ({"torchao": {"weight_dtype": "int4", "group_size": -1}}, AffineInt(bits=4, block_size="row", packing="int8")),
    ({"backend": "torchao", "weight_dtype": torch.float8_e4m3fn}, FP8()),
    ({"backend": "torchao", "weight_dtype": "fp8"}, FP8()),
    ({"backend": "torchao", "weight_dtype": "float8_e5m2"}, FP8(kind="e5m2")),
    ({"backend": "torchao", "weight_dtype": "nvfp4", "group_size": 16}, NVFP4()),
    ({"backend": "gptq", "weight_dtype": "int4"}, AffineInt(bits=4, block_size=128, packing="gptq")),
    ({"backend": "gptq", "weight_dtype": "int8", "group_size": -1}, AffineInt(bits=8, block_size="row", packing="gptq")),
    ({"backend": "awq", "weight_dtype": "uint4"}, AffineInt(bits=4, block_size=128, symmetric=False, packing="awq")),
    ({"hqq": {"weight_dtype": "int3"}}, AffineInt(bits=3, block_size=64, symmetric=False, packing="hqq", layout="flat")),
    ({"quanto": {"weight_dtype": "int4"}}, AffineInt(bits=4, block_size=128, symmetric=False, packing="quanto", layout="flat")),
    ({"quanto": {"weight_dtype": "int8"}}, AffineInt(bits=8, block_size="row", packing="int8")),
    ({"compressed_tensors": {"weight_dtype": "int4"}}, AffineInt(bits=4, block_size=128, packing="compressed")),
    ({"backend": "compressed-tensors", "weight_dtype": "fp8"}, FP8()),
    ({"backend": "fp8"}, FP8(block_size=(128, 128))),
    ({"fp8": {"weight_dtype": "mxfp8"}}, MXFP8()),
    ({"mxfp4": {}}, MXFP4()),
    ({"backend": "mxfp4", "weight_dtype": "mxfp4", "group_size": 32}, MXFP4()),
    ({"backend": "bitnet"}, Ternary()),
    (
        {"backend": "bnb", "weight_dtype": "nf4", "activation_dtype": None, "quantize_embedding": False, "load_in_4bit": None},
        NF4(),
    ),
]


@pytest.mark.parametrize(("given", "meant"), MEANT, ids=[str(given) for given, _ in MEANT])
def test_what_an_option_means(given, meant):
    before = json.dumps(given, default=str)
    assert choose_format(given) == meant
    assert json.dumps(given, default=str) == before


@pytest.mark.parametrize("backend", options._BACKENDS)
def test_every_dtype_of_a_backend_stores_a_weight(backend):
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    for dtype in options._BACKENDS[backend]:
        fmt = choose_format({"backend": backend, "weight_dtype": dtype})
        error = (fmt.dequant(fmt.requant(weight)) - weight).norm() / weight.norm()
        assert error < (1.1 if dtype in ("int1", "int2", "ternary") else 0.35), dtype


NF = {"backend": "bnb", "weight_dtype": "nf4"}
REFUSED = [
    ({"weight_dtype": "nf4"}, "exactly one backend is required, got none; known are 'bnb', 'torchao', "),
    ({}, "exactly one backend is required, got none; known are 'bnb'"),
    (
        {"bnb": {"weight_dtype": "nf4"}, "torchao": {"weight_dtype": "int4"}},
        "backend is required, got 'bnb', 'torchao'; remove all",
    ),
    ({**NF, "torchao": {"weight_dtype": "int4"}}, "exactly one backend is required, got 'bnb', 'torchao'; remove all but one"),
    ({**NF, "backend": ["bnb", "torchao"]}, "exactly one backend is required, got 'bnb', 'torchao'; remove all but one"),
    ({**NF, "backend": "torcha"}, "backend must be known, got 'torcha'; did you mean 'torchao'?"),
    ({**NF, "grup_size": 64}, "fields must be known, got 'grup_size'; did you mean 'group_size'?"),
    ({"bnb": {"weight_dtype": "nf4", "double_quants": True}}, "got 'double_quants'; did you mean 'double_quant'?"),
    ({"tochao": {"weight_dtype": "int4"}}, "fields must be known, got 'tochao'; did you mean 'torchao'?"),
    ({"backend": "bnb"}, "weight_dtype is required; bnb has 'nf4', 'fp4', 'int8'."),
    (
        {"backend": "bnb", "weight_dtype": "int4"},
        "that bnb has, got 'int4'; it has 'nf4', 'fp4', 'int8', and 'int4' is that of",
    ),
    (
        {"backend": "bnb", "weight_dtype": "int9"},
        "weight_dtype must be one that bnb has, got 'int9'; it has 'nf4', 'fp4', 'int8'.",
    ),
    ({"backend": "torchao", "weight_dtype": "nf4"}, "that torchao has, got 'nf4'; it has 'int2', "),
    (
        {"backend": "torchao", "weight_dtype": "mxfp4"},
        "got 'mxfp4'; torchao has no weight-only layer for mxfp4 (its MX layers round",
    ),
    ({"backend": "torchao", "weight_dtype": "mxfp8"}, "got 'mxfp8'; torchao has no weight-only layer for mxfp8"),
    (
        {"backend": "bnb", "weight_dtype": "int8", "group_size": 64},
        "bnb's int8 has no group_size, got 64; leave group_size out",
    ),
    ({"backend": "torchao", "weight_dtype": "fp8", "group_size": 32}, "torchao's fp8 has no group_size, got 32; leave"),
    (
        {"backend": "torchao", "weight_dtype": "nvfp4", "group_size": 32},
        "nvfp4 has the group_size 16, got 32; leave group_size out",
    ),
    ({"backend": "quanto", "weight_dtype": "int8", "group_size": 64}, "quanto's int8 has no group_size, got 64"),
    ({**NF, "group_size": "64"}, "group_size must be a positive int, or -1 for whole rows, got '64'"),
    ({**NF, "group_size": True}, "group_size must be a positive int, or -1 for whole rows, got True"),
    ({**NF, "group_size": 0}, "group_size must be a positive int, or -1 for whole rows, got 0"),
    ({**NF, "group_size": -1}, "group_size must be positive with bnb, got -1; its default is 64"),
    ({**NF, "group_size": 63}, "nf4: block_size must be even and positive, got 63"),
    (
        {"backend": "bnb", "weight_dtype": "int8", "double_quant": True},
        "double_quant is for bnb's nf4 and fp4, got bnb's int8; leave",
    ),
    ({"torchao": {"weight_dtype": "int4", "double_quant": True}}, "double_quant is for bnb's nf4 and fp4, got torchao's int4"),
    (
        {**NF, "activation_dtype": "int8"},
        "only weights are stored; activations are computed in the model's dtype, got activation_dty",
    ),
    (
        {"backend": "torchao", "activation_dtype": "fp8"},
        "weight_dtype is required: weights are stored, activations are not, got",
    ),
    ({"backend": "fp8", "activation_dtype": "fp8"}, "weight_dtype is required: weights are stored, activations are not, got"),
    (
        {**NF, "quantize_embedding": True},
        "which layers are stored is not a part of the format, got quantize_embedding=True; name them",
    ),
    (
        {**NF, "load_in_4bit": True},
        "load_in_4bit is the older spelling and contradicts 'weight_dtype', 'backend', got load_in_4bit=T",
    ),
    (
        {"load_in_8bit": True},
        "load_in_8bit is the older spelling, got load_in_8bit=True; write backend='bnb', weight_dtype='int8'",
    ),
]


@pytest.mark.parametrize(("given", "text"), REFUSED, ids=[str(given) for given, _ in REFUSED])
def test_contradictions_are_refused(given, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        choose_format(given)


def test_a_base_that_is_quantized_already_is_refused(tmp_path):
    text = r"a base that is not quantized is required, got one already quantized as (\w+); load it with load_pretrained"
    dense, quantized = LlamaConfig(), LlamaConfig()
    quantized.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    quantized.save_pretrained(tmp_path / "four")
    dense.save_pretrained(tmp_path / "dense")
    for config in (
        quantized,
        quantized.to_dict(),
        tmp_path / "four",
        str(tmp_path / "four"),
        {"compression_config": {"quant_method": "x"}},
    ):
        with pytest.raises(ValueError, match=text):
            choose_format(NF, config)
    for config in (None, dense, dense.to_dict(), tmp_path / "dense", {}):
        assert choose_format(NF, config) == NF4()
