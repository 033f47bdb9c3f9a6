"""HQQ's and quanto's layers as leaves: bit for bit what the libraries decode to, transforms, and what is refused."""

import re

import pytest
import torch
from torch import nn

import funcpeft as fp
from funcpeft.interop.libraries import HQQ, Quanto
from funcpeft.interop.libraries.quanto import _weight as quanto_weight
from funcpeft.interop.modules import owner
from funcpeft.quant.affineint import AffineInt
from funcpeft.quant.fp8 import FP8

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),  # both, at import and in their kernels
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:SyntaxWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(out=96, in_=128, bias=True, dtype=torch.float32):
    layer = nn.Linear(in_, out, bias, dtype=dtype)
    layer.requires_grad_(False)
    layer.weight.normal_(std=0.02)
    return layer


def hqq_layer(nbits=4, group_size=64, axis=1, dtype=torch.float32, shape=(96, 128), bias=True, **options):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis)
    config["weight_quant_params"] |= options
    return quantize.HQQLinear(linear(*shape, bias), config, compute_dtype=dtype, device="cpu")


def quanto_layer(kind="qint8", dtype=torch.float32, shape=(96, 128), freeze=True, activations=None):
    quanto = pytest.importorskip("optimum.quanto")
    layer = quanto.nn.QLinear.from_module(linear(*shape, dtype=dtype), weights=getattr(quanto, kind), activations=activations)
    if freeze:
        layer.freeze()
    return layer


def llama(hidden=64):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def hqq_llama():
    quantize = pytest.importorskip("hqq.core.quantize")
    module = llama()
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    for path, layer in [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        module.set_submodule(path, quantize.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu"))
    return module


def quanto_llama(kind):
    quanto = pytest.importorskip("optimum.quanto")
    module = llama()
    quanto.quantize(module, weights=getattr(quanto, kind), exclude="lm_head")
    quanto.freeze(module)
    return module


IDS = torch.tensor([[1, 5, 9, 2], [7, 7, 3, 1]])


# -- HQQ ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1.58, 1])
def test_an_hqq_weight_is_taken_bit_for_bit(nbits, axis, dtype):
    layer = hqq_layer(nbits, axis=axis, dtype=dtype)
    taken = HQQ().take(layer, "a", torch.float32, {})
    weight = taken.weight.format.dequant(taken.weight)
    assert weight.dtype == dtype
    assert weight.shape == (96, 128)
    assert torch.equal(weight, layer.dequantize())
    assert torch.equal(taken.bias, layer.bias)
    assert taken.weight.format.layout == ("flat" if axis else "strided")
    assert torch.equal(taken.weight.format.requant(weight, like=taken.weight).data["qdata"], taken.weight.data["qdata"])


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": None},
        {"group_size": None, "axis": 0},
        {"group_size": 48, "shape": (96, 80)},  # groups run over the ends of rows
        {"view_as_float": True},
        {"view_as_float": True, "dtype": torch.bfloat16},
        {"channel_wise": False},
        {"round_zero": True},
        {"optimize": False, "bias": False},
    ],
)
def test_hqq_options(options):
    layer = hqq_layer(**options)
    taken = HQQ().take(layer, "a", torch.float32, {})
    assert torch.equal(taken.weight.format.dequant(taken.weight), layer.dequantize())
    assert (taken.bias is None) == (layer.bias is None)
    if "channel_wise" in options:
        assert taken.weight.format == AffineInt(bits=4, block_size="tensor", symmetric=False, packing="hqq")


def test_codes_of_hqq_share_storage_with_the_layer():
    layer = hqq_layer()
    taken = HQQ().take(layer, "a", torch.float32, {})
    assert taken.weight.data["qdata"].data_ptr() == layer.W_q.data_ptr()
    assert type(taken.weight.data["qdata"]) is torch.Tensor


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"quant_scale": True}, "must be stored as numbers, got quantized ones; quantize with quant_scale=False"),
        ({"quant_zero": True}, "and quant_zero=False."),
        ({"packing": None}, "packing must be one of '8bit_u8', '4bit_u8', '3bit_32', '2bit_u8', '1bit_u8', got None;"),
        ({"packing": "4bit_new"}, "got '4bit_new'; quantize with bitpack=True."),
    ],
)
def test_other_hqq_layouts_are_refused(change, text):
    layer = hqq_layer()
    layer.meta |= change
    with pytest.raises(ValueError, match="hqq at 'a.b': .*" + re.escape(text)):
        HQQ().take(layer, "a.b", torch.float32, {})


def test_offloaded_and_unready_and_patched_hqq_layers_are_refused():
    layer = hqq_layer()
    layer.meta["zero_scale"] = torch.stack((layer.meta.pop("zero"), layer.meta.pop("scale")))
    with pytest.raises(
        ValueError, match=r"hqq at 'a': scale and zero must be in meta, got .*; quantize with offload_meta=False"
    ):
        HQQ().take(layer, "a", torch.float32, {})
    quantize = pytest.importorskip("hqq.core.quantize")
    empty = quantize.HQQLinear(None, quantize.BaseQuantizeConfig(nbits=4), device="cpu", initialize=False)
    with pytest.raises(ValueError, match=r"hqq at 'a': a quantized weight is required, got none; call the layer's initialize"):
        fp.functionalize(nn.ModuleDict({"a": empty}))
    kernel = type("MarlinLinear", (nn.Module,), {"__module__": "hqq.backends.marlin"})()
    assert isinstance(owner(kernel), HQQ)
    text = "at 'a': codes in HQQ's own packing are required, got a kernel's MarlinLinear; take the model before prepare_for_inf"
    with pytest.raises(ValueError, match=text):
        HQQ().take(kernel, "a", torch.float32, {})


def test_an_hqq_model_computes_the_same():
    module = hqq_llama()
    model, params = fp.functionalize(module)
    assert isinstance(params["model.layers.0.self_attn.q_proj.weight"].format, AffineInt)
    assert torch.equal(model(params, input_ids=IDS).logits, module(input_ids=IDS).logits)


# -- quanto ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["qint8", "qint4", "qint2", "qfloat8", "qfloat8_e5m2"])
@pytest.mark.parametrize("shape", [(96, 128), (64, 256), (32, 192), (33, 80)])
def test_a_quanto_weight_is_taken_bit_for_bit(kind, dtype, shape):
    layer = quanto_layer(kind, dtype, shape)
    taken = Quanto().take(layer, "a", torch.float32, {})
    weight = taken.weight.format.dequant(taken.weight)
    assert weight.dtype == dtype
    assert torch.equal(weight, layer.weight.dequantize())
    assert torch.equal(taken.bias, layer.bias)
    assert isinstance(taken.weight.format, FP8 if "float" in kind else AffineInt)
    again = taken.weight.format.requant(weight.float(), like=taken.weight)
    if dtype == torch.float32:
        assert all(torch.equal(t, taken.weight.data[n]) for n, t in again.data.items())


def test_a_quanto_weight_with_integer_zeros():
    quanto = pytest.importorskip("optimum.quanto")
    layer = linear(64, 256)
    scale, shift = quanto.MaxOptimizer()(layer.weight, qtype=quanto.qint4, axis=0, group_size=128, zeropoint=True)
    made = quanto.nn.QLinear.from_module(layer, weights=quanto.qint4)
    made.weight = nn.Parameter(
        quanto.quantize_weight(layer.weight, qtype=quanto.qint4, axis=0, scale=scale, shift=shift, group_size=128), False
    )
    taken = Quanto().take(made, "a", torch.float32, {})
    assert "zero_point" in taken.weight.data
    assert torch.equal(taken.weight.format.dequant(taken.weight), made.weight.dequantize())


def test_a_quanto_weight_reordered_for_a_kernel():
    layer = quanto_layer("qint4", torch.bfloat16, (64, 256))
    assert type(layer.weight).__name__ == "TinyGemmWeightQBitsTensor"
    taken = Quanto().take(layer, "a", torch.float32, {})
    assert torch.equal(taken.weight.format.dequant(taken.weight), layer.weight.dequantize())
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    theirs, ours = layer(x).float(), nn.functional.linear(x, taken.weight.format.dequant(taken.weight), taken.bias).float()
    assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()


def test_a_quanto_weight_reordered_for_cuda_is_put_in_order_first():
    layer = quanto_layer("qfloat8")
    reordered = type("MarlinF8QBytesTensor", (), {"axis": 0, "qtype": layer.weight.qtype})()
    reordered.weight_qbytes_tensor = lambda: layer.weight
    q = quanto_weight(reordered, "a")
    assert torch.equal(q.format.dequant(q), layer.weight.dequantize())


def test_quanto_codes_share_storage_with_the_layer():
    layer = quanto_layer("qint4", shape=(64, 256))
    taken = Quanto().take(layer, "a", torch.float32, {})
    assert taken.weight.data["qdata"].data_ptr() == layer.weight._data._data.data_ptr()
    assert taken.weight.nbytes == 64 * 256 // 2 + 2 * 4 * 128


@pytest.mark.parametrize("kind", ["qint8", "qint4", "qint2", "qfloat8"])
def test_a_quanto_model_computes_the_same(kind):
    module = quanto_llama(kind)
    model, params = fp.functionalize(module)
    ours, theirs = model(params, input_ids=IDS).logits, module(input_ids=IDS).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()  # quanto scales the product, not the weight


def test_quanto_layers_that_do_more_or_less_are_refused():
    quanto = pytest.importorskip("optimum.quanto")
    text = "quanto at 'a': a stored weight is required, got one that is quantized at every call; call optimum.quanto.freeze"
    with pytest.raises(ValueError, match=re.escape(text)):
        fp.functionalize(nn.ModuleDict({"a": quanto_layer(freeze=False)}))
    text = "quanto at 'a': inputs must be met as they are, got activations=qint8; a leaf is a weight alone, so quantize"
    with pytest.raises(ValueError, match=re.escape(text)):
        fp.functionalize(nn.ModuleDict({"a": quanto_layer(activations=quanto.qint8)}))
    with pytest.raises(ValueError, match="got qfloat8_e4m3fnuz; quantize with one of these"):
        Quanto().take(quanto_layer("qfloat8_e4m3fnuz"), "a", torch.float32, {})
    convolution = quanto.nn.QConv2d.from_module(nn.Conv2d(2, 2, 1), weights=quanto.qint8)
    with pytest.raises(ValueError, match="quanto at 'a': a QLinear is required, got QConv2d; exclude it when quantizing"):
        fp.functionalize(nn.ModuleDict({"a": convolution}))
    layer = quanto_layer()
    layer.weight._axis = -1
    with pytest.raises(ValueError, match="the weight must be quantized by rows, got axis -1; quantize with axis=0"):
        Quanto().take(layer, "a", torch.float32, {})


# -- both --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [hqq_llama, lambda: quanto_llama("qint4")])
def test_every_transform_goes_through_taken_leaves(make):
    module = make()
    model, params = fp.functionalize(module)
    net = fp.adapt(model, fp.LoRA(r=2, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(net(params, net.init(params, seed=0), input_ids=IDS).logits, model(params, input_ids=IDS).logits)
    adapters = [net.init(params, seed=s) for s in range(3)]
    adapters = [a.replace(params={n: {k: t + 0.01 for k, t in v.items()} for n, v in a.params.items()}) for a in adapters]

    def loss(leaves, adapter):
        return net(params, adapter.replace(params=leaves), input_ids=IDS).logits.square().mean()

    grads = [torch.func.grad(loss)(a.params, a) for a in adapters]
    assert all(t.isfinite().all() and t.any() for v in grads[0].values() for t in v.values())
    dense = fp.dequantize(params)
    other = torch.func.grad(lambda p: net(dense, adapters[0].replace(params=p), input_ids=IDS).logits.square().mean())(
        adapters[0].params
    )
    path = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(grads[0][path], other[path])
    many = fp.stack(adapters)
    mapped = torch.func.vmap(torch.func.grad(loss))(many.params, many)
    torch.testing.assert_close({k: t[1] for k, t in mapped[path].items()}, grads[1][path], rtol=1e-4, atol=1e-6)
    _, tangent = torch.func.jvp(lambda p: loss(p, adapters[0]), (adapters[0].params,), (adapters[0].params,))
    pairs = [(g, adapters[0].params[n][k]) for n, v in grads[0].items() for k, g in v.items()]
    expected = sum((g * p).sum() for g, p in pairs)
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("library", "text"), [(HQQ(), "transformers does not load HQQ"), (Quanto(), "does not save quanto's")])
def test_neither_is_written(library, text):
    stored = AffineInt(bits=4, block_size=8).requant(torch.randn(8, 16))
    assert text in library.refuses(stored)
    assert library.quant_methods == ()
