"""torchao's tensors as leaves, its checkpoints both ways, and what is refused."""

import json
import re
import warnings

import pytest
import torch
from torch import nn

import funcpeft as fp
from funcpeft.errors import CheckpointError
from funcpeft.interop.libraries import TorchAO
from funcpeft.interop.libraries.torchao import TorchAONF4
from funcpeft.interop.modules import owner
from funcpeft.interop.transformers import load_pretrained
from funcpeft.interop.writing import write_quantized
from funcpeft.quant.affineint import AffineInt
from funcpeft.quant.fp4 import FP4
from funcpeft.quant.fp8 import FP8
from funcpeft.quant.int8 import Int8
from funcpeft.quant.mxfp4 import MXFP4
from funcpeft.quant.mxfp8 import MXFP8
from funcpeft.quant.nf4 import NF4
from funcpeft.quant.nvfp4 import NVFP4

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),  # torchao, at import
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:SyntaxWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:torchao.*"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.tensor([[1, 5, 9, 2], [7, 7, 3, 1]])
PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def ao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao.quantization")


def drawn(out=64, in_=96, dtype=torch.float32):
    return (0.02 * torch.randn(out, in_, generator=torch.Generator().manual_seed(1))).to(dtype)


def holding(tensor, bias=True):
    layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias, dtype=tensor.dtype).requires_grad_(False)
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    return layer


def taken(tensor):
    return TorchAO().take(holding(tensor), "a.b", torch.float32, {}).weight


def decoded(quantized):
    return quantized.format.dequant(quantized)


def same(a, b):
    return a.format == b.format and a.data.keys() == b.data.keys() and all(torch.equal(t, b.data[n]) for n, t in a.data.items())


def llama(dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval().requires_grad_(False)


def configs():
    import torchao.quantization as ao
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

    return {
        "int8": ao.Int8WeightOnlyConfig(),
        "int8 groups": ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32)),
        "int8 tensor": ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()),
        "fp8": ao.Float8WeightOnlyConfig(),
        "fp8 tensor": ao.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2, granularity=ao.PerTensor()),
        "intx": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        "intx rows": ao.IntxWeightOnlyConfig(weight_dtype=torch.int3, mapping_type=ao.MappingType.ASYMMETRIC),
        "nvfp4": NVFP4WeightOnlyConfig(),
        "nvfp4 plain": NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=False),
    }


CONFIGS = ["int8", "int8 groups", "int8 tensor", "fp8", "fp8 tensor", "intx", "intx rows", "nvfp4", "nvfp4 plain"]


def saved(tmp_path, name):
    """Saves a tiny Llama as transformers writes it with a config of torchao; returns its module."""
    from transformers import AutoModelForCausalLM, TorchAoConfig

    llama().save_pretrained(tmp_path / "base")
    config = TorchAoConfig(configs()[name])
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, attn_implementation="eager")
    module.save_pretrained(tmp_path / "saved")
    return module.eval().requires_grad_(False)


def reloaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


# -- tensors in memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
@pytest.mark.parametrize(("granularity", "block"), [("PerRow", "row"), ("PerTensor", "tensor"), ("PerGroup", 32)])
def test_int8_is_taken_bit_for_bit(ao, dtype, mapping, granularity, block):
    along = ao.PerGroup(32) if block == 32 else getattr(ao, granularity)()
    weight = drawn(dtype=dtype) + 0.01
    tensor = ao.Int8Tensor.from_hp(weight, along, mapping_type=getattr(ao.MappingType, mapping))
    q = taken(tensor)
    assert q.format == AffineInt(bits=8, block_size=block, symmetric=mapping == "SYMMETRIC", packing="int8")
    assert decoded(q).dtype == dtype
    assert torch.equal(decoded(q), tensor.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_intx_is_taken_bit_for_bit(ao, bits, mapping, dtype):
    target, kind = getattr(torch, f"int{bits}"), getattr(ao.MappingType, mapping)
    tensor = ao.IntxUnpackedToInt8Tensor.from_hp(drawn(dtype=dtype), (1, 32), target, mapping_type=kind)
    q = taken(tensor)
    assert q.format == AffineInt(bits=bits, block_size=32, symmetric=mapping == "SYMMETRIC", packing="int8")
    assert torch.equal(decoded(q), tensor.dequantize())
    if dtype == torch.float32:
        assert same(q.format.requant(decoded(q), like=q), q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.parametrize(("granularity", "block"), [("PerRow", "row"), ("PerTensor", "tensor"), ("PerGroup", 32)])
def test_float8_is_taken_bit_for_bit(ao, dtype, kind, granularity, block):
    along = ao.PerGroup(32) if block == 32 else getattr(ao, granularity)()
    codes = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    tensor = ao.Float8Tensor.from_hp(drawn(dtype=dtype), codes, along)
    q = taken(tensor)
    assert q.format == FP8(block_size=block, kind=kind)
    assert torch.equal(decoded(q), tensor.dequantize())


def test_float8_in_tiles_and_with_an_unshaped_scale(ao):
    codes = drawn(64, 96).to(torch.float8_e4m3fn)
    tiles = ao.Float8Tensor(codes, torch.rand(2, 3), block_size=[32, 32], dtype=torch.float32)
    assert taken(tiles).format == FP8(block_size=(32, 32))
    assert torch.equal(decoded(taken(tiles)), tiles.dequantize())
    whole = ao.Float8Tensor(codes, torch.rand(()), block_size=[], dtype=torch.float32)
    assert taken(whole).format == FP8(block_size="tensor")
    assert torch.equal(decoded(taken(whole)), codes.float() * whole.scale)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("shape", [(64, 96), (130, 80)])
@pytest.mark.parametrize(("swizzled", "whole"), [(False, False), (True, False), (True, True)])
def test_nvfp4_is_taken_bit_for_bit(ao, dtype, shape, swizzled, whole):
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    weight = drawn(*shape, dtype=dtype)
    scale = weight.float().abs().max() / 2688 if whole else None
    tensor = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale, is_swizzled_scales=swizzled)
    q = taken(tensor)
    assert q.format == NVFP4(per_tensor=whole)
    assert q.data["scale"].shape == (shape[0], shape[1] // 16)
    assert torch.equal(decoded(q), tensor.dequantize())


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("element", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2])
def test_mx_is_taken_bit_for_bit(ao, dtype, element, swizzled):
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    tensor = MXTensor.to_mx(drawn(dtype=dtype), element, is_swizzled_scales=swizzled)
    q = taken(tensor)
    assert isinstance(q.format, MXFP4 if element == torch.float4_e2m1fn_x2 else MXFP8)
    assert torch.equal(decoded(q), tensor.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_is_taken_bit_for_bit(ao, dtype):
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    tensor = to_nf4(drawn(256, 128, dtype), 64, 256)
    q = taken(tensor)
    assert q.format == TorchAONF4(block_size=64, precision=str(dtype).removeprefix("torch."))
    assert torch.equal(decoded(q), tensor.get_original_weight())
    # the paper's levels, which NF4 has, are others
    assert (torch.tensor(q.format.levels) - torch.tensor(NF4.levels)).abs().max() > 4e-5


def test_the_laws_of_torchaos_nf4():
    fp.testing.check_format(TorchAONF4(block_size=32, precision="bfloat16"), max_examples=5)
    with pytest.raises(ValueError, match="precision must be one of 'float32', 'bfloat16', 'float16', got 'float64'"):
        TorchAONF4(precision="float64")


def test_leaves_share_storage_and_keep_the_bias(ao):
    layer = holding(ao.Int8Tensor.from_hp(drawn(), ao.PerRow()))
    assert isinstance(owner(layer), TorchAO)
    assert owner(nn.Linear(2, 2)) is None
    found = TorchAO().take(layer, "a", torch.float32, {})
    assert found.weight.data["qdata"].data_ptr() == layer.weight.qdata.data_ptr()
    assert found.bias.data_ptr() == layer.bias.data_ptr()
    assert TorchAO().take(holding(layer.weight, bias=False), "a", torch.float32, {}).bias is None


# -- models ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_torchao_computes_the_same(ao, name):
    module = llama()
    ao.quantize_(module.model, configs()[name])
    model, params = fp.functionalize(module)
    assert isinstance(params[f"{PATH}.weight"], fp.Quantized)
    ours, theirs = model(params, input_ids=IDS).logits, module(input_ids=IDS).logits
    if name in ("int8", "int8 tensor"):  # torchao scales the product with the codes, not the weight
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_every_transform_goes_through_taken_leaves(ao, name):
    module = llama()
    ao.quantize_(module.model, configs()[name])
    model, params = fp.functionalize(module)
    net = fp.adapt(model, fp.LoRA(r=2, target_modules=["q_proj", "down_proj"]))
    adapters = [net.init(params, seed=s) for s in range(3)]
    assert torch.equal(net(params, adapters[0], input_ids=IDS).logits, model(params, input_ids=IDS).logits)
    adapters = [a.replace(params={n: {k: t + 0.01 for k, t in v.items()} for n, v in a.params.items()}) for a in adapters]

    def loss(leaves, adapter, params=params):
        return net(params, adapter.replace(params=leaves), input_ids=IDS).logits.square().mean()

    grads = [torch.func.grad(loss)(a.params, a) for a in adapters]
    dense = torch.func.grad(loss)(adapters[0].params, adapters[0], fp.dequantize(params))
    torch.testing.assert_close(grads[0], dense)
    many = fp.stack(adapters)
    mapped = torch.func.vmap(torch.func.grad(loss))(many.params, many)
    torch.testing.assert_close({k: t[1] for k, t in mapped[PATH].items()}, grads[1][PATH], rtol=1e-4, atol=1e-6)
    _, tangent = torch.func.jvp(lambda p: loss(p, adapters[0]), (adapters[0].params,), (adapters[0].params,))
    pairs = [(g, adapters[0].params[n][k]) for n, v in grads[0].items() for k, g in v.items()]
    torch.testing.assert_close(tangent, sum((g * p).sum() for g, p in pairs), rtol=1e-4, atol=1e-6)


def test_a_taken_layer_compiles(ao):
    model, params = fp.functionalize(nn.Sequential(holding(ao.IntxUnpackedToInt8Tensor.from_hp(drawn(), (1, 32), torch.int4))))
    net = fp.adapt(model, fp.LoRA(r=2, target_modules=["0"]))
    adapter, x = net.init(params, seed=0), torch.randn(3, 96)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params, adapter, x), net(params, adapter, x))


# -- what is refused in memory -----------------------------------------------------------------------------------------------


def test_layouts_of_kernels_are_refused(ao):
    packed = ao.Int4Tensor(torch.zeros(64, 48, dtype=torch.int8), torch.ones(3, 64), torch.zeros(3, 64), [1, 32], (64, 96))
    known = "'Int8Tensor', 'IntxUnpackedToInt8Tensor', 'Float8Tensor', 'NVFP4Tensor', 'MXTensor', 'NF4Tensor'"
    text = (
        f"torchao at 'a': one of {known} is required, whose layout is known, got Int4Tensor; quantize with a weight-only config"
    )
    with pytest.raises(ValueError, match=text):
        fp.functionalize(nn.ModuleDict({"a": holding(packed)}))


def test_weights_that_change_the_input_are_refused(ao):
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    int8, fp8 = ao.Int8Tensor.from_hp(drawn(), ao.PerRow()), ao.Float8Tensor.from_hp(drawn())
    int8.act_pre_scale, fp8.act_quant_kwargs = torch.ones(96), QuantizeTensorToFloat8Kwargs()
    text = "torchao at 'a.b', {}: inputs must be met as they are, got {}; a leaf is a weight alone, so quantize with a w"
    with pytest.raises(ValueError, match=re.escape(text.format("Int8Tensor", "act_pre_scale"))):
        taken(int8)
    with pytest.raises(ValueError, match=re.escape(text.format("Float8Tensor", "act_quant_kwargs"))):
        taken(fp8)
    layer = nn.Linear(64, 32)
    ao.quantize_(layer, ao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="torchao at 'a', Int8Tensor: inputs must be met as they are, got act_quant_kwargs"):
        fp.functionalize(nn.ModuleDict({"a": layer}))
    layer = nn.Linear(64, 32)
    ao.quantize_(layer, ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=ao.PerGroup(32)))
    with pytest.raises(ValueError, match="inputs must be met as they are, got activation_quantization"):
        fp.functionalize(nn.ModuleDict({"a": layer}))


def test_only_linear_layers_are_taken(ao):
    table = nn.Embedding(16, 32)
    table.weight = nn.Parameter(ao.Int8Tensor.from_hp(drawn(16, 32), ao.PerRow()), requires_grad=False)
    text = "torchao at 'a': the weight of a Linear is required, got 'weight' of a Embedding; leave the layer out of quantize_"
    with pytest.raises(ValueError, match=text):
        fp.functionalize(nn.ModuleDict({"a": table}))


def test_tensors_that_do_not_fit_their_class_are_refused(ao):
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    odd = ao.IntxUnpackedToInt8Tensor.from_hp(drawn(), (1, 32), torch.int4)
    odd.zero_point = torch.full((64, 3), 0.5)
    with pytest.raises(ValueError, match=r"torchao at 'a.b', Intx.*: 'zero_point' must hold codes, got 0\.5"):
        taken(odd)
    mx = MXTensor.to_mx(drawn(), torch.float8_e4m3fn)
    mx.elem_dtype = torch.float16
    with pytest.raises(ValueError, match=r"elem_dtype must be float8_e4m3fn, .* or float4_e2m1fn_x2, got torch\.float16"):
        taken(mx)
    mx.block_size = 16
    with pytest.raises(ValueError, match="MXTensor: block_size must be 32, got 16"):
        taken(mx)
    other = to_nf4(drawn(256, 128), 64, 256)
    other.nf4 = other.nf4 * 2
    with pytest.raises(ValueError, match=r"NF4Tensor: the levels must be torchao's own, got \[-2\.0, "):
        taken(other)


# -- checkpoints: reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_of_transformers_is_read_and_written_again(ao, tmp_path, name):
    from safetensors import safe_open

    module = saved(tmp_path, name)
    model, params = load_pretrained(tmp_path / "saved")
    _, live = fp.functionalize(module)
    assert params.keys() == live.keys()
    for key, leaf in live.items():
        if isinstance(leaf, fp.Quantized):
            assert same(params[key], leaf), key
            assert params[key].dtype == leaf.dtype
        else:
            assert torch.equal(params[key], leaf)
    assert isinstance(params["lm_head.weight"], torch.Tensor)
    write_quantized(model, params, tmp_path / "again", library="torchao")
    files = [safe_open(tmp_path / n / "model.safetensors", "pt") for n in ("saved", "again")]
    optional = {k for k in files[0].keys() if k.endswith("zero_point")}  # all zero in an Int8Tensor
    assert set(files[0].keys()) - optional <= set(files[1].keys()) <= set(files[0].keys())
    for key in files[1].keys():
        assert torch.equal(files[0].get_tensor(key), files[1].get_tensor(key)), key
    theirs, ours = (json.loads(f.metadata()[f"{PATH}.weight"]) for f in files)
    assert ours["_type"] == theirs["_type"]
    assert ours["_data"].items() <= theirs["_data"].items()
    config = [json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in ("saved", "again")]
    wanted, made = (c["quant_type"]["default"] for c in config)
    assert (made["_type"], made["_version"]) == (wanted["_type"], wanted["_version"])
    assert made["_data"].items() <= wanted["_data"].items()


def tensors_of(quantized, path="a"):
    made, metadata = TorchAO().write(quantized, path)
    return made, metadata


def read(made, metadata, shape=(64, 96), path="a"):
    return TorchAO().read(made, path, torch.Size(shape), torch.float32, {}, metadata)


def test_dense_layers_are_left_to_others():
    assert read({"weight": drawn()}, {}) is None


def test_a_description_may_have_a_prefix_more_or_less():
    made, metadata = tensors_of(FP8().requant(drawn()), "model.a")
    assert isinstance(read(made, metadata).format, FP8)
    made, metadata = tensors_of(FP8().requant(drawn()))
    assert isinstance(read(made, metadata, path="model.a").format, FP8)


@pytest.mark.parametrize(
    ("described", "text"),
    [
        (
            None,
            "torchao at 'a': the metadata of the file must describe 'a.weight', got none; save the model with",
        ),
        ("{", "torchao at 'a': the description of the weight must be JSON, got Expecting property name"),
        ("[]", "torchao at 'a': the description of the weight must have '_type' and '_data', got []."),
        ('{"_type": "Int4Tensor", "_data": {}}', "whose layout is known, got Int4Tensor; quantize with a weight-only config"),
    ],
)
def test_corrupt_descriptions_are_refused(described, text):
    made, _ = tensors_of(FP8().requant(drawn()))
    with pytest.raises(CheckpointError, match=re.escape(text)):
        read(made, {} if described is None else {"a.weight": described})


def changed(fmt, **facts):
    made, metadata = tensors_of(fmt.requant(drawn()))
    described = json.loads(metadata["a.weight"])
    described["_data"] |= facts
    return made, {"a.weight": json.dumps(described)}


@pytest.mark.parametrize(
    ("fmt", "facts", "text"),
    [
        (FP8(), {"block_size": [1, 7]}, "Float8Tensor: block_size must divide 64 x 96, got [1, 7]."),
        (FP8(), {"block_size": [96]}, "block_size must divide 64 x 96, got [96]."),
        (FP8(), {"block_size": 96}, "block_size must divide 64 x 96, got 96."),
        (FP8(), {"block_size": [1, 32]}, "'scale' must have shape (64, 3), got (64, 1)."),
        (FP8(), {"dtype": {"_type": "torch.dtype", "_data": "float1"}}, "'dtype' must be given, got ['block_size']."),
        (FP8(), {"act_quant_kwargs": {}}, "inputs must be met as they are, got act_quant_kwargs; a leaf is a weight alone"),
        (
            AffineInt(),
            {"target_dtype": None},
            "Tensor: 'target_dtype' must be given, got ['block_size', 'dtype'].",
        ),
        (
            AffineInt(),
            {"target_dtype": {"_type": "torch.dtype", "_data": "int16"}},
            "target_dtype must be one of 'int1',",
        ),
        (NVFP4(), {"block_size": 8}, "NVFP4Tensor: block_size must be 16, got 8."),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(fmt, facts, text):
    with pytest.raises(CheckpointError, match=re.escape(text)):
        read(*changed(fmt, **facts))


def test_tensors_of_a_file_that_do_not_fit_are_refused():
    made, metadata = tensors_of(FP8().requant(drawn()))
    with pytest.raises(CheckpointError, match=re.escape("tensor 'scale' is required, got ['qdata'].")):
        read({"_weight_qdata": made["_weight_qdata"]}, metadata)
    with pytest.raises(CheckpointError, match=re.escape("'qdata' must have shape (64, 96), got (32, 96).")):
        read({**made, "_weight_qdata": made["_weight_qdata"][:32]}, metadata)
    with pytest.raises(CheckpointError, match="'qdata' must be float8_e4m3fn or float8_e5m2, got int8"):
        read({**made, "_weight_qdata": made["_weight_qdata"].view(torch.int8)}, metadata)


# -- checkpoints: writing ----------------------------------------------------------------------------------------------------

WRITTEN = {
    "int8 rows": (AffineInt(bits=8, block_size="row"), "Int8Tensor"),
    "int8 tensor": (AffineInt(bits=8, block_size="tensor"), "Int8Tensor"),
    "int8 groups": (AffineInt(bits=8, block_size=32), "Int8Tensor"),
    "int8 zeros": (AffineInt(bits=8, block_size="row", symmetric=False), "IntxUnpackedToInt8Tensor"),
    "int4 nibbles": (AffineInt(bits=4, block_size=32), "IntxUnpackedToInt8Tensor"),
    "int4 gptq": (AffineInt(bits=4, block_size=32, symmetric=False, packing="gptq"), "IntxUnpackedToInt8Tensor"),
    "int3 rows": (AffineInt(bits=3, block_size="row"), "IntxUnpackedToInt8Tensor"),
    "fp8": (FP8(), "Float8Tensor"),
    "fp8 e5m2 tensor": (FP8(block_size="tensor", kind="e5m2"), "Float8Tensor"),
    "fp8 groups": (FP8(block_size=32), "Float8Tensor"),
    "nvfp4": (NVFP4(), "NVFP4Tensor"),
    "nvfp4 plain": (NVFP4(per_tensor=False), "NVFP4Tensor"),
}
HALF = ["int8 rows", "int4 gptq", "fp8", "nvfp4"]


@pytest.mark.parametrize(("name", "dtype"), [*((n, torch.float32) for n in WRITTEN), *((n, torch.bfloat16) for n in HALF)])
def test_a_written_folder_computes_the_same(ao, tmp_path, name, dtype):
    fmt, kind = WRITTEN[name]
    model, params = fp.functionalize(llama(dtype))
    params = {k: fmt.requant(t) if k.endswith("_proj.weight") else t for k, t in params.items()}
    write_quantized(model, params, tmp_path, library="torchao")
    module = reloaded(tmp_path)
    for key, leaf in params.items():
        if isinstance(leaf, fp.Quantized):
            weight = module.get_parameter(key)
            assert type(weight).__name__ == kind
            assert weight.dtype == dtype
            assert torch.equal(weight.dequantize(), decoded(leaf))
    ours, theirs = model(params, input_ids=IDS).logits, module(input_ids=IDS).logits
    if kind == "Int8Tensor":
        bound = 1e-5 if dtype == torch.float32 else 0.02
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max()
    else:
        assert torch.equal(ours, theirs)
    _, back = load_pretrained(tmp_path)
    assert all(torch.equal(decoded(back[k]), decoded(v)) for k, v in params.items() if isinstance(v, fp.Quantized))


def test_a_folder_may_mix_formats(ao, tmp_path):
    model, params = fp.functionalize(llama())
    fmts = {"q_proj": FP8(), "k_proj": AffineInt(), "v_proj": NVFP4(), "down_proj": AffineInt(bits=8, block_size="row")}
    params = {k: next((f.requant(t) for n, f in fmts.items() if n in k), t) for k, t in params.items()}
    write_quantized(model, params, tmp_path, library="torchao")
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    made = quantization["quant_type"]["default"]
    assert made["_type"] == "FqnToConfig"
    assert made["_data"]["fqn_to_config"][PATH]["_type"] == "Float8WeightOnlyConfig"
    module = reloaded(tmp_path)
    assert type(module.get_parameter("model.layers.1.mlp.up_proj.weight")) is nn.Parameter
    torch.testing.assert_close(model(params, input_ids=IDS).logits, module(input_ids=IDS).logits)


# -- what is not written -----------------------------------------------------------------------------------------------------


def stored(fmt, shape=(8, 64), dtype=torch.float32, **data):
    q = fmt.requant(torch.randn(shape))
    return fp.Quantized({**q.data, **data}, q.format, q.shape, dtype)


@pytest.mark.parametrize(
    ("quantized", "text"),
    [
        (stored(NF4()), "transformers does not save torchao's NF4Tensor"),
        (stored(TorchAONF4()), "transformers does not save torchao's NF4Tensor"),
        (
            stored(Int8()),
            "by the scale, not by scale / 127; store it as AffineInt(bits=8, block_size='row')",
        ),
        (stored(MXFP4()), "torchao has no product with an MXTensor that leaves the input as it is"),
        (stored(MXFP8()), "torchao has no product with an MXTensor that leaves the input as it is"),
        (stored(FP4()), "torchao has no class for FP4("),
        (stored(FP8(), (2, 3, 8, 8)), "torchao's layers hold matrices, not shape (2, 3, 8, 8)"),
        (stored(FP8(), dtype=torch.float64), "torchao decodes to float32, bfloat16 or float16, not float64"),
        (stored(FP8(block_size=(4, 4))), "torchao's groups are parts of rows, not block_size (4, 4)"),
        (stored(AffineInt(bits=8, block_size=7), (2, 10)), "in_features must be a multiple of block_size 7"),
        (stored(AffineInt(block_size="tensor")), "torchao's groups are parts of rows, not block_size 'tensor'"),
        (stored(AffineInt(block_size=8, layout="flat")), "torchao's groups are parts of rows, not of layout 'flat'"),
        (stored(AffineInt(), g_idx=torch.zeros(64, dtype=torch.int32)), "torchao has no act order"),
        (stored(AffineInt(), shift=torch.ones(8, 2)), "torchao stores integer zero points, not float shifts"),
        (stored(AffineInt(), zero_point=torch.full((8, 2), 7.5)), "torchao stores zero points as int8"),
        (stored(AffineInt(), zero_point=torch.full((8, 2), 200, dtype=torch.uint8)), "torchao stores zero points as int8"),
        (stored(NVFP4(), per_tensor_scale=torch.ones(2)), "torchao's layers have one per_tensor_scale"),
    ],
)
def test_refusals_say_why(quantized, text):
    assert text in TorchAO().refuses(quantized)


@pytest.mark.parametrize("fmt", [f for f, _ in WRITTEN.values()], ids=list(WRITTEN))
def test_what_is_not_refused_comes_back(fmt):
    q = fmt.requant(drawn())
    assert TorchAO().refuses(q) is None
    back = read(*tensors_of(q))
    assert torch.equal(decoded(back), decoded(q))
    assert back.format.requant(decoded(back), like=back).data.keys() == back.data.keys()
