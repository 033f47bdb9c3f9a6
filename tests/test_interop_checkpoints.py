"""GPTQ, AWQ, INC, EETQ, AQLM, BitNet, compressed-tensors and fp8: read bit for bit, written back, refused with the reason."""

import re
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

import funcpeft as fp
from funcpeft.errors import CheckpointError
from funcpeft.interop.libraries import AQLM, AWQ, EETQ, GPTQ, INC, BitNet, CompressedTensors, FineGrainedFP8
from funcpeft.interop.modules import owner
from funcpeft.quant import NF4
from funcpeft.quant.affineint import AffineInt
from funcpeft.quant.codebook import Codebook
from funcpeft.quant.fp8 import FP8
from funcpeft.quant.ternary import Ternary

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # aqlm's scripting, compressed-tensors' and its dependencies'
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
]

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.tensor([[1, 5, 9, 2], [7, 7, 3, 1]])


def drawn(*shape, seed=0, dtype=torch.float32):
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def integers(high, *shape, seed=0, low=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def read(library, tensors, shape, dtype=torch.float32, **config):
    return library.read(tensors, "layer", torch.Size(shape), dtype, config, {})


def decoded(leaf):
    return leaf.format.dequant(leaf)


def assert_same(a, b):
    assert (a.format, a.shape, a.dtype, list(a.data)) == (b.format, b.shape, b.dtype, list(b.data))
    for name in a.data:
        assert a.data[name].dtype == b.data[name].dtype, name
        assert a.data[name].shape == b.data[name].shape, name
        assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a.data[name], b.data[name]))), name


def refused(library, tensors, shape, message, **config):
    with pytest.raises(CheckpointError, match=re.escape(message)) as e:
        read(library, tensors, shape, **config)
    assert "at 'layer'" in str(e.value)


def llama(dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attn_implementation="eager", dtype=dtype,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def quantized(fmt, dtype=torch.float32):
    model, params = fp.functionalize(llama(dtype))
    return model, fp.quantize(model, params, fmt, progress=False)


def loaded_by_us(folder):
    return fp.load_pretrained(folder, attn_implementation="eager")


def from_pretrained(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval().requires_grad_(False)


# -- bit streams, by hand ----------------------------------------------------------------------------------------------------


def words(rows, bits):
    """Packs rows of codes into int32 words, the earlier code in the lower bits: one long integer per row."""
    out = []
    for row in rows.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        unsigned = [(number >> (32 * k)) & 0xFFFFFFFF for k in range(count)]
        out.append([w - 2**32 if w >= 2**31 else w for w in unsigned])
    return torch.tensor(out, dtype=torch.int32)


def awq_words(rows):
    """Packs eight columns per word, nibble k having column [0, 2, 4, 6, 1, 3, 5, 7][k]."""
    return torch.cat([words(r[[0, 2, 4, 6, 1, 3, 5, 7]][None], 4) for r in rows.reshape(-1, 8)]).reshape(rows.shape[0], -1)


def grid(out, in_, bits, size, seed=0, dtype=torch.float16):
    """Draws codes, zeros (not 0) and scales of a weight."""
    groups = -(-in_ // size)
    return (
        integers(2**bits, out, in_, seed=seed),
        integers(2**bits, out, groups, seed=seed + 1, low=1),
        (drawn(out, groups, seed=seed + 2).abs() + 0.01).to(dtype),
    )


def entries(codes, zero, scale, order):
    """Computes the weight entry by entry."""
    rows = [
        [(int(q) - int(zero[o, order[i]])) * float(scale[o, order[i]]) for i, q in enumerate(row)]
        for o, row in enumerate(codes.tolist())
    ]
    return torch.tensor(rows, dtype=torch.float32)


def gptq_tensors(codes, zero, scale, bits, less, order=None):
    tensors = {
        "qweight": words(codes, bits).t().contiguous(),
        "qzeros": words((zero.t() - less) % 2**bits, bits),
        "scales": scale.t().contiguous(),
    }
    return tensors if order is None else tensors | {"g_idx": torch.tensor(order, dtype=torch.int32)}


# -- GPTQ --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_reads_both_formats(bits, label, ordered):
    out, in_, size = 32, 64, 16
    codes, zero, scale = grid(out, in_, bits, size)
    order = [i // size for i in range(in_)] if ordered else integers(in_ // size, in_, seed=9).tolist()
    tensors = gptq_tensors(codes, zero, scale, bits, int(label == "gptq"), order)
    leaf = read(GPTQ(), tensors, (out, in_), torch.float16, bits=bits, group_size=size, checkpoint_format=label, sym=False)
    assert leaf.format == AffineInt(bits=bits, block_size=size, symmetric=False, packing="gptq")
    assert ("g_idx" in leaf.data) is not ordered
    assert torch.equal(decoded(leaf), entries(codes, zero, scale, order).half())


def test_gptq_reads_whole_rows_short_groups_and_no_order():
    for size, block, inputs in [(-1, "row", 64), (64, "row", 64), (48, 48, 48)]:
        codes, zero, scale = grid(16, 64, 4, inputs)
        leaf = read(GPTQ(), gptq_tensors(codes, zero, scale, 4, 1), (16, 64), bits=4, group_size=size)
        assert leaf.format.block_size == block
        assert torch.equal(decoded(leaf), entries(codes, zero, scale, [i // inputs for i in range(64)]))


def test_gptq_leaves_symmetric_zeros_out():
    codes, _, scale = grid(16, 64, 4, 32)
    tensors = gptq_tensors(codes, torch.full((16, 2), 8), scale, 4, 1)
    leaf = read(GPTQ(), tensors, (16, 64), bits=4, group_size=32, sym=True)
    assert list(leaf.data) == ["qdata", "scale"]
    assert leaf.format == AffineInt(packing="gptq")
    assert leaf.data["qdata"].data_ptr() == tensors["qweight"].data_ptr()


def test_gptq_says_when_transformers_saved_a_loaded_checkpoint_again():
    codes, _, scale = grid(16, 64, 4, 32)
    tensors = gptq_tensors(codes, torch.full((16, 2), 8), scale, 4, 0)
    message = "zeros of a symmetric checkpoint must be 8, got 9; it was loaded and saved again by transformers: change its"
    refused(GPTQ(), tensors, (16, 64), message, bits=4, group_size=32, sym=True, checkpoint_format="gptq")
    assert read(GPTQ(), tensors, (16, 64), bits=4, group_size=32, sym=True, checkpoint_format="gptq_v2") is not None


def test_a_layer_that_is_dense_in_the_checkpoint_is_none():
    weight = {"weight": drawn(16, 64)}
    for library in (GPTQ(), AWQ(), INC(), EETQ(), AQLM(), BitNet(), CompressedTensors(), FineGrainedFP8()):
        assert read(library, weight, (16, 64), quant_method=library.quant_methods[0]) is None


def affine(packing, bits=4, block_size=16, symmetric=False, shape=(32, 64), dtype=torch.float16, seed=0):
    """Returns a leaf with scales in half precision, as those libraries have them, and no zero of 0."""
    fmt = AffineInt(bits=bits, block_size=block_size, symmetric=symmetric, packing=packing)
    leaf = fmt.requant(drawn(*shape, seed=seed, dtype=dtype))
    data = {**leaf.data, "scale": leaf.data["scale"].to(dtype)}
    if "zero_point" in data:
        data["zero_point"] = data["zero_point"].clamp(min=1)
    return replace(leaf, data=data)


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    ("bits", "size", "symmetric"), [(2, 16, False), (3, 32, True), (4, 16, True), (4, "row", False), (8, 64, False)]
)
def test_gptq_writes_what_its_label_says(bits, size, symmetric, label):
    library, leaf = GPTQ(checkpoint_format=label), affine("gptq", bits, size, symmetric)
    if size == 64:
        leaf = replace(leaf, format=replace(leaf.format, block_size="row"))
    assert library.refuses(leaf) is None
    tensors, entries_ = library.write(leaf, "model.layers.0.up")
    config = library.config({"model.layers.0.up": leaf}, ())
    assert config["checkpoint_format"] == label
    assert config["sym"] is symmetric
    assert entries_ == {}
    assert_same(read(library, tensors, leaf.shape, leaf.dtype, **config), leaf)
    stored = tensors["qzeros"]
    zero = leaf.data.get("zero_point", torch.full_like(leaf.data["scale"], 2 ** (bits - 1)))
    assert torch.equal(stored, words((zero.t().long() - int(label == "gptq")) % 2**bits, bits))


def test_gptq_writes_the_order_of_groups():
    leaf = affine("gptq")
    order = torch.arange(64).flip(0).to(torch.int32) // 16
    ordered = replace(leaf, data={**leaf.data, "g_idx": order})
    tensors, _ = GPTQ().write(ordered, "m.0.up")
    config = GPTQ().config({"m.0.up": ordered, "m.1.up": leaf}, ("head",))
    assert config["desc_act"] is True
    assert "modules_in_block_to_quantize" not in config
    assert_same(read(GPTQ(), tensors, leaf.shape, leaf.dtype, **config), ordered)


def test_gptq_names_the_stored_layers_of_blocks_that_have_others():
    leaf = affine("gptq")
    stored = {"m.h.0.attn.q": leaf, "m.h.0.mlp.up": leaf, "m.h.1.attn.q": leaf, "m.h.1.mlp.up": leaf}
    config = GPTQ().config(stored, ("m.h.0.mlp.down", "m.h.1.mlp.down", "head"))
    assert config["modules_in_block_to_quantize"] == [["attn.q", "mlp.up"]]
    with pytest.raises(ValueError, match=re.escape("gptq at 'm.h.1.mlp.up': must be stored as 'm.h.0.mlp.up' is, since one")):
        GPTQ().config({"m.h.0.mlp.up": leaf}, ("m.h.1.mlp.up",))
    with pytest.raises(ValueError, match=re.escape("gptq at 'head': transformers loads layers of the model's blocks only")):
        GPTQ().config({"head": leaf}, ())


def test_gptq_config_describes_layers_that_are_alike_only():
    with pytest.raises(ValueError, match=re.escape("gptq at 'm.1.up': must be stored as 'm.0.up' is, since one configuration")):
        GPTQ().config({"m.0.up": affine("gptq"), "m.1.up": affine("gptq", block_size=32)}, ())


def test_gptq_has_two_formats():
    with pytest.raises(ValueError, match=re.escape("gptq: checkpoint_format must be one of 'gptq', 'gptq_v2', got 'marlin'.")):
        GPTQ(checkpoint_format="marlin")


# -- AWQ, INC, EETQ ----------------------------------------------------------------------------------------------------------


def awq_tensors(codes, zero, scale):
    return {"qweight": awq_words(codes.t()), "qzeros": awq_words(zero.t()), "scales": scale.t().contiguous()}


@pytest.mark.parametrize(("size", "inputs"), [(16, 16), (-1, 64)])
def test_awq_reads_columns_in_its_order(size, inputs):
    codes, zero, scale = grid(24, 64, 4, inputs)
    leaf = read(AWQ(), awq_tensors(codes, zero, scale), (24, 64), torch.float16, bits=4, group_size=size, version="gemm")
    assert leaf.format == AffineInt(block_size="row" if size == -1 else size, symmetric=False, packing="awq")
    assert torch.equal(decoded(leaf), entries(codes, zero, scale, [i // inputs for i in range(64)]).half())


@pytest.mark.parametrize(("size", "symmetric"), [(16, False), (32, True), ("row", False)])
def test_awq_writes_what_it_reads(size, symmetric):
    leaf = affine("awq", 4, size, symmetric)
    tensors, _ = AWQ().write(leaf, "m.0.up")
    config = AWQ().config({"m.0.up": leaf}, ("lm_head",))
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert config["version"] == "gemm"
    assert_same(read(AWQ(), tensors, leaf.shape, leaf.dtype, **config), leaf)
    assert torch.equal(tensors["qweight"], awq_words(leaf.format.codes(leaf).long().t()))


def test_awq_never_stores_a_head():
    with pytest.raises(ValueError, match=re.escape("awq at 'lm_head': transformers never loads a stored head")):
        AWQ().config({"lm_head": affine("awq")}, ())


def inc_layer(tensors, bits=4, group_size=16, **options):
    """Returns a layer as the library has them, by its name and its attributes."""
    kind = type("INCWeightOnlyLinear", (nn.Module,), {"__module__": "neural_compressor.torch.algorithms.modules"})
    layer = kind()
    layer.bits, layer.group_size, layer.use_optimum_format = bits, group_size, True
    layer.in_features, layer.out_features = 64, 32
    for name, t in tensors.items():
        layer.register_buffer(name, t)
    layer.g_idx = None
    for name, value in options.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inc_stores_zeros_less_one_modulo(bits):
    codes, zero, scale = grid(32, 64, bits, 16)
    zero[0] = 0  # stored as the largest code
    tensors = gptq_tensors(codes, zero, scale, bits, 1)
    leaf = read(INC(), tensors, (32, 64), torch.float16, bits=bits, group_size=16)
    assert torch.equal(decoded(leaf), entries(codes, zero, scale, [i // 16 for i in range(64)]).half())
    layer = inc_layer(tensors | {"bias": drawn(32)}, bits)
    assert owner(layer) == INC()
    taken = INC().take(layer, "layer", torch.float16, {})
    assert_same(taken.weight, leaf)
    assert torch.equal(taken.bias, layer.bias)


def test_inc_takes_the_layout_of_hugging_face_only():
    with pytest.raises(
        ValueError, match=re.escape("inc at 'up': a layer with its weight as the checkpoint has it is required, got")
    ):
        INC().take(inc_layer({}, use_optimum_format=False), "up", torch.float32, {})


def test_eetq_reads_plain_codes_and_refuses_those_of_a_kernel():
    weight = drawn(24, 64)
    scale = (weight.abs().amax(1) / 127).half()
    codes = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    tensors = {"weight": codes.t().contiguous(), "weight_scales": scale}
    leaf = read(EETQ(), tensors, (24, 64), torch.float16)
    assert torch.equal(decoded(leaf), (codes.float() * scale.float()[:, None]).half())
    message = "'weight' must hold codes in order, got bytes in the order of a GPU's kernel; load the model that was quantized"
    biased = tensors["weight"] ^ -128  # what adding 128 makes of a byte
    refused(EETQ(), tensors | {"weight": biased}, (24, 64), message)
    extremes = torch.tensor([-64, 63], dtype=torch.int8).expand(32, 2)
    assert read(EETQ(), {"weight": extremes, "weight_scales": scale[:2]}, (2, 32)) is not None


def test_eetq_layers_in_memory_are_refused():
    from transformers.integrations.eetq import EetqLinear

    layer = EetqLinear(64, 32)
    assert owner(layer) == EETQ()
    with pytest.raises(
        ValueError, match=re.escape("eetq at 'up': a layer with its weight as the checkpoint has it is required")
    ):
        EETQ().take(layer, "up", torch.float32, {})


# -- AQLM --------------------------------------------------------------------------------------------------------------------


def aqlm_layer(count=1, bits=16, dtype=torch.float16, rows=1, columns=8, shape=(16, 64), bias=True):
    aqlm = pytest.importorskip("aqlm")
    layer = aqlm.QuantizedLinear(shape[1], shape[0], columns, rows, count, bits, bias, dtype=dtype)
    half = 2 ** (bits - 1)
    layer.codes.data = integers(half, *layer.codes.shape, low=-half).to(layer.codes.dtype)
    layer.codebooks.data = drawn(*layer.codebooks.shape, seed=1, dtype=dtype)
    layer.scales.data = (1 + drawn(*layer.scales.shape, seed=2)).to(dtype)
    if bias:
        layer.bias.data = drawn(shape[0], seed=3, dtype=dtype)
    return layer


AQLM_KINDS = [(1, 16, 1, 8), (2, 8, 1, 8), (3, 5, 2, 4)]


def aqlm_config(count, bits, rows, columns):
    return {
        "num_codebooks": count, "nbits_per_codebook": bits, "out_group_size": rows, "in_group_size": columns
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", AQLM_KINDS, ids=str)
def test_aqlm_decodes_as_the_library(kind, dtype):
    count, bits, rows, columns = kind
    layer = aqlm_layer(count, bits, dtype, rows, columns)
    from aqlm.utils import _dequantize_weight, unpack_int_data

    codes = unpack_int_data(layer.codes.data.clone(), bits)
    expected = _dequantize_weight(codes, layer.codebooks.data, layer.scales.data)
    leaf = read(AQLM(), dict(layer.named_parameters()), layer_shape(layer), dtype, **aqlm_config(*kind))
    assert leaf.format == Codebook(**aqlm_config(*kind))
    assert torch.equal(decoded(leaf), expected)
    taken = AQLM().take(layer, "layer", dtype, {})
    assert_same(taken.weight, leaf)
    assert torch.equal(taken.bias, layer.bias)
    tensors, _ = AQLM().write(leaf, "layer")
    config = AQLM().config({"layer": leaf}, ("lm_head",))
    assert config["linear_weights_not_to_quantize"] == ["lm_head"]
    assert_same(read(AQLM(), tensors, leaf.shape, leaf.dtype, **config), leaf)


def layer_shape(layer):
    return layer.out_features, layer.in_features


def test_aqlm_layer_is_taken_before_and_after_a_forward_that_keeps_its_codes():
    layer = aqlm_layer(bits=10)
    before = AQLM().take(layer, "layer", torch.float16, {}).weight
    layer.prepare_matmul_op(torch.zeros(1, 64, dtype=torch.float16))
    assert_same(AQLM().take(layer, "layer", torch.float16, {}).weight, before)


@pytest.mark.parametrize("shape", [(16, 64), (8, 64)], ids=str)
def test_aqlm_layer_whose_codes_a_forward_has_moved_is_refused(shape, monkeypatch):
    import aqlm.inference

    for name in ("get_forward_pass_kernel", "get_backward_pass_kernel"):  # the codes are moved before numba is missed
        monkeypatch.setattr(aqlm.inference, name, lambda *_: None)
    layer = aqlm_layer(2, 8, shape=shape)
    layer.prepare_matmul_op(torch.zeros(1, 64, dtype=torch.float16))
    message = "aqlm at 'up': a layer with its weight as the checkpoint has it is required, got a forward has moved the axes"
    with pytest.raises(ValueError, match=re.escape(message)):
        AQLM().take(layer, "up", torch.float16, {})


# -- BitNet ------------------------------------------------------------------------------------------------------------------


def eagerly():
    return torch.compiler.set_stance("force_eager")  # transformers compiles parts of these layers, which takes a minute


def bit_linear(dtype=torch.float32, **options):
    from transformers.integrations.bitnet import BitLinear, pack_weights

    layer = BitLinear(64, 32, bias=True, dtype=dtype, **options)
    layer.weight.copy_(pack_weights(integers(3, 32, 64) - 1))
    layer.weight_scale.fill_(37.5)
    layer.bias.copy_(drawn(32, dtype=dtype))
    return layer


def auto_bit_linear(dtype=torch.float32, online=False, **options):
    from transformers.integrations.bitnet import AutoBitLinear

    layer = AutoBitLinear(64, 32, bias=True, dtype=dtype, online_quant=online, **options).requires_grad_(False)
    if not online:
        layer.weight.copy_(integers(3, 32, 64) - 1)
        layer.weight_scale.fill_(0.0125)
    return layer


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bitnet_reads_packed_codes_and_what_divides(dtype):
    from transformers.integrations.bitnet import unpack_weights

    layer = bit_linear(dtype)
    with eagerly():
        codes = unpack_weights(layer.weight, torch.float32)
    leaf = read(BitNet(), {"weight": layer.weight, "weight_scale": layer.weight_scale}, (32, 64), dtype)
    assert leaf.format == Ternary()
    assert torch.equal(decoded(leaf), (codes / 37.5).to(dtype))
    taken = BitNet().take(layer, "layer", dtype, {})
    assert_same(taken.weight, leaf)
    x = torch.randint(-127, 128, (3, 64)).to(torch.float32)
    x[:, 0] = 127  # inputs that rounding to eight bits leaves as they are
    if dtype == torch.float32:
        with eagerly():
            torch.testing.assert_close(nn.functional.linear(x, decoded(taken.weight), taken.bias), layer(x))


def test_bitnet_takes_floats_of_the_three_codes():
    layer = auto_bit_linear(torch.bfloat16)
    leaf = BitNet().take(layer, "layer", torch.bfloat16, {}).weight
    assert leaf.format == Ternary(inverse=False)
    assert leaf.nbytes < 32 * 64 / 4 + 8
    assert torch.equal(decoded(leaf), layer.weight * layer.weight_scale)
    tensors = {"weight": layer.weight, "weight_scale": layer.weight_scale}
    assert_same(read(BitNet(), tensors, (32, 64), torch.bfloat16, linear_class="autobitlinear"), leaf)
    packed = {"weight": leaf.data["qdata"], "weight_scale": layer.weight_scale}
    assert_same(read(BitNet(), packed, (32, 64), torch.bfloat16, linear_class="autobitlinear"), leaf)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bitnet_rounds_an_online_weight_as_its_layer_does(dtype):
    from transformers.integrations.bitnet import WeightQuant

    layer = auto_bit_linear(dtype, online=True)
    with eagerly():
        expected = WeightQuant.apply(layer.weight)
    taken = BitNet().take(layer, "layer", dtype, {})
    assert torch.equal(decoded(taken.weight), expected)
    online = {"linear_class": "autobitlinear", "quantization_mode": "online"}
    assert_same(read(BitNet(), {"weight": layer.weight}, (32, 64), dtype, **online), taken.weight)
    assert BitNet().read({"weight": layer.weight}, "lm_head", torch.Size((32, 64)), dtype, online, {}) is None
    kept = online | {"modules_to_not_convert": ["layer"]}
    assert read(BitNet(), {"weight": layer.weight}, (32, 64), dtype, **kept) is None


@pytest.mark.parametrize("inverse", [True, False])
def test_bitnet_writes_what_it_reads(inverse):
    leaf = Ternary(inverse=inverse).requant(drawn(32, 64))
    tensors, _ = BitNet().write(leaf, "layer")
    config = BitNet().config({"layer": leaf}, ())
    assert tensors["weight_scale"].shape == (1,)
    assert config["modules_to_not_convert"] == []
    assert_same(read(BitNet(), tensors, (32, 64), **config), leaf)
    with pytest.raises(ValueError, match="bitnet at 'b': must be stored as"):
        BitNet().config({"a": leaf, "b": Ternary(inverse=not inverse).requant(drawn(32, 64))}, ())


@pytest.mark.parametrize("make", [bit_linear, auto_bit_linear])
def test_bitnet_layer_with_a_norm_is_refused(make):
    message = "bitnet at 'up': a layer with its weight as the checkpoint has it is required, got a layer that normalises its"
    with pytest.raises(ValueError, match=re.escape(message)):
        BitNet().take(make(use_rms_norm=True), "up", torch.float32, {})


# -- compressed-tensors ------------------------------------------------------------------------------------------------------


def scheme(bits=4, strategy="group", size=16, symmetric=True, kind="int", form="pack-quantized", tile=None):
    weights = {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    weights |= {"group_size": size} if strategy == "group" else {}
    weights |= {"block_structure": tile} if strategy == "block" else {}
    return {"targets": ["Linear"], "weights": weights, "format": form}


def compressed_config(*schemes, ignore=()):
    return {
        "quant_method": "compressed-tensors", "format": schemes[0]["format"], "quantization_status": "compressed",
        "config_groups": {f"group_{i}": s for i, s in enumerate(schemes)}, "ignore": list(ignore),
    }  # fmt: skip


def compressed(described, dtype=torch.float32, shape=(48, 64)):
    """Returns the tensors that the library makes of a weight, and the weight that it makes of them."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    args = described["weights"]
    out, in_ = shape
    tables = {"group": (out, in_ // 16), "channel": (out, 1), "tensor": (1,), "block": (-(-out // 32), -(-in_ // 32))}
    table, top = tables[args["strategy"]], 448 if args["type"] == "float" else 2 ** (args["num_bits"] - 1) - 0.5
    state = {"weight": drawn(*shape, dtype=dtype), "weight_scale": (0.05 / top * (1 + drawn(*table, seed=4).abs())).to(dtype)}
    if not args["symmetric"]:
        half = 2 ** (args["num_bits"] - 1)
        state["weight_zero_point"] = integers(half, *table, low=-half, seed=5).to(torch.int8)
    library = BaseCompressor.get_value_from_registry(described["format"])
    described = QuantizationScheme.model_validate(described)
    tensors = library.compress(state, described)
    return tensors, library.decompress(tensors, described)["weight"]


PACKED = [
    scheme(), scheme(symmetric=False), scheme(8), scheme(3, symmetric=False), scheme(8, "channel", symmetric=False),
    scheme(4, "channel"), scheme(4, "tensor"), scheme(4, "tensor", symmetric=False),
]  # fmt: skip
BYTES = [
    scheme(8, "channel", form="int-quantized"), scheme(8, "group", symmetric=False, form="int-quantized"),
    scheme(8, "tensor", form="naive-quantized"), scheme(8, "channel", kind="float", form="float-quantized"),
    scheme(8, "tensor", kind="float", form="float-quantized"),
    scheme(8, "block", kind="float", form="float-quantized", tile=[32, 32]),
]  # fmt: skip


def named(described):
    args = described["weights"]
    return f"{described['format']}-{args['num_bits']}-{args['strategy']}-{'sym' if args['symmetric'] else 'asym'}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("described", PACKED + BYTES, ids=named)
def test_compressed_tensors_decodes_as_the_library(described, dtype):
    tensors, expected = compressed(described, dtype)
    leaf = read(CompressedTensors(), tensors, (48, 64), dtype, **compressed_config(described))
    assert torch.equal(decoded(leaf), expected)
    assert expected.unique().numel() > 8


def test_compressed_tensors_reads_a_tile_that_is_cut_off():
    described = scheme(8, "block", kind="float", form="float-quantized", tile="32x32")
    tensors, expected = compressed(
        described | {"weights": described["weights"] | {"block_structure": [32, 32]}}, shape=(40, 48)
    )
    leaf = read(CompressedTensors(), tensors, (40, 48), **compressed_config(described))
    assert torch.equal(decoded(leaf), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("described", PACKED[:1] + PACKED[2:3] + BYTES[3:4], ids=named)
def test_compressed_tensors_checkpoint_computes_as_in_transformers(described, dtype, tmp_path):
    """The folder is the library's, by hand; the logits are those of the model that it decompresses in its first forward."""
    import json

    from safetensors.torch import save_file

    module = llama(dtype)
    paths = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    tensors = {n: t.clone() for n, t in module.state_dict().items() if n.rpartition(".")[0] not in paths}
    for path in paths:
        made, _ = compressed(described, dtype, tuple(module.get_submodule(path).weight.shape))
        tensors |= {f"{path}.{n}": t for n, t in made.items()}
    module.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"quantization_config": compressed_config(described, ignore=["lm_head"]), "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded = from_pretrained(tmp_path)
    model, params = loaded_by_us(tmp_path)
    taken_model, taken = fp.functionalize(loaded)
    stored = {k for k, v in params.items() if isinstance(v, fp.Quantized)}
    assert len(stored) == len(paths) == sum(isinstance(v, fp.Quantized) for v in taken.values())
    for key in stored:
        assert_same(taken[key], params[key])
    ours = model(params, IDS).logits
    assert torch.equal(taken_model(taken, IDS).logits, ours)
    assert torch.equal(loaded(IDS).logits, ours)
    message = (
        "a layer with its weight as the checkpoint has it is required, got a forward of the model has made its weight dense"
    )
    with pytest.raises(ValueError, match=message):
        fp.functionalize(loaded)


def test_a_layer_that_the_library_has_decompressed_in_place_is_a_dense_one():
    described = scheme()
    tensors, expected = compressed(described)
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus

    layer = nn.Linear(64, 48, bias=False)
    del layer.weight
    for name, t in tensors.items():
        layer.register_parameter(name, nn.Parameter(t, requires_grad=False))
    layer.quantization_scheme = QuantizationScheme.model_validate(described)
    layer.quantization_status = QuantizationStatus.COMPRESSED
    assert owner(layer) == CompressedTensors()
    assert torch.equal(decoded(CompressedTensors().take(layer, "layer", torch.float32, {}).weight), expected)
    decompress_module(layer)
    assert owner(layer) is None
    model, params = fp.functionalize(nn.Sequential(layer))
    assert torch.equal(params["0.weight"], expected)
    assert torch.equal(model(params, drawn(3, 64)), nn.functional.linear(drawn(3, 64), expected))


WRITTEN = [
    AffineInt(block_size=16, packing="compressed"),
    AffineInt(bits=8, block_size="row", packing="compressed"),
    AffineInt(bits=3, block_size="tensor", symmetric=False, packing="compressed"),
    FP8(),
    FP8(block_size="tensor"),
    FP8(block_size=(16, 32)),
]


@pytest.mark.parametrize("fmt", WRITTEN, ids=repr)
def test_compressed_tensors_writes_what_it_reads(fmt):
    leaf = fmt.requant(drawn(48, 64))
    assert CompressedTensors().refuses(leaf) is None
    tensors, _ = CompressedTensors().write(leaf, "layer")
    config = CompressedTensors().config({"layer": leaf}, ("lm_head",))
    assert config["ignore"] == ["lm_head"]
    assert_same(read(CompressedTensors(), tensors, (48, 64), **config), leaf)


def test_compressed_tensors_describes_layers_that_differ():
    leaves = {
        "a": WRITTEN[0].requant(drawn(48, 64)),
        "b": WRITTEN[3].requant(drawn(48, 64)),
        "c": WRITTEN[0].requant(drawn(48, 64)),
    }
    config = CompressedTensors().config(leaves, ())
    assert config["format"] == "mixed-precision"
    assert [g["targets"] for g in config["config_groups"].values()] == [["a", "c"], ["b"]]
    for path, leaf in leaves.items():
        tensors, _ = CompressedTensors().write(leaf, path)
        assert_same(CompressedTensors().read(tensors, path, leaf.shape, leaf.dtype, config, {}), leaf)


def test_compressed_tensors_finds_a_layer_by_name_then_pattern_then_class():
    tensors, _ = compressed(scheme(8, "channel"))
    by_class, by_pattern, by_name = (
        scheme(4),
        scheme(2) | {"targets": ["re:.*up"]},
        scheme(8, "channel") | {"targets": ["m.up"]},
    )
    config = compressed_config(by_class, by_pattern, by_name)
    leaf = CompressedTensors().read(tensors, "m.up", torch.Size((48, 64)), torch.float32, config, {})
    assert leaf.format.bits == 8
    tensors, _ = compressed(scheme(2))
    assert CompressedTensors().read(tensors, "n.up", torch.Size((48, 64)), torch.float32, config, {}).format.bits == 2


def test_compressed_tensors_reads_act_order_of_older_files():
    tensors, _ = compressed(scheme())
    plain = read(CompressedTensors(), tensors, (48, 64), **compressed_config(scheme()))
    for order in (torch.arange(64) // 16, torch.full((64,), -1)):
        leaf = read(CompressedTensors(), tensors | {"weight_g_idx": order}, (48, 64), **compressed_config(scheme()))
        assert_same(leaf, plain)
    order = integers(4, 64, seed=8)
    leaf = read(CompressedTensors(), tensors | {"weight_g_idx": order}, (48, 64), **compressed_config(scheme()))
    codes = plain.format.codes(plain).long()
    assert torch.equal(decoded(leaf), entries(codes, torch.full((48, 4), 8), tensors["weight_scale"], order.tolist()))


# -- fp8 ---------------------------------------------------------------------------------------------------------------------


def fp8_tensors(shape=(64, 96), tile=(16, 32), name="weight_scale_inv", scale=torch.float32):
    table = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    return {"weight": drawn(*shape).mul(2000).to(torch.float8_e4m3fn), name: (1 + drawn(*table, seed=1)).to(scale)}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [(16, 32), (64, 96), (1, 32)])
def test_fp8_decodes_as_transformers_does(tile, scale, dtype):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors = fp8_tensors(tile=tile, scale=scale)
    expected = Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"], dtype)
    leaf = read(FineGrainedFP8(), tensors, (64, 96), dtype, quant_method="fp8", weight_block_size=list(tile))
    assert torch.equal(decoded(leaf), expected)
    for name in ("scale", "qscale_weight"):
        other = {"weight": tensors["weight"], name: tensors["weight_scale_inv"]}
        assert_same(read(FineGrainedFP8(), other, (64, 96), dtype, weight_block_size=tile), leaf)


def test_fp8_reads_one_number_powers_of_two_and_cut_off_tiles():
    weight = fp8_tensors()["weight"]
    one = {"weight": weight, "weight_scale_inv": torch.tensor(0.5), "activation_scale": torch.tensor(1.0)}
    leaf = read(FineGrainedFP8(), one, (64, 96), weight_block_size=None)
    assert leaf.format == FP8(block_size="tensor")
    assert torch.equal(decoded(leaf), weight.float() / 2)
    exponents = torch.tensor([[126, 128, 127], [120, 127, 1]], dtype=torch.uint8)
    for scale in (exponents, exponents.view(torch.float8_e8m0fnu)):
        leaf = read(FineGrainedFP8(), {"weight": weight, "weight_scale_inv": scale}, (64, 96), weight_block_size=(32, 32))
        spread = (2.0 ** (exponents.double() - 127)).repeat_interleave(32, 0).repeat_interleave(32, 1)
        assert torch.equal(decoded(leaf), (weight.double() * spread).float())
    ragged = fp8_tensors((40, 70), (32, 32))
    spread = ragged["weight_scale_inv"].repeat_interleave(32, 0).repeat_interleave(32, 1)[:40, :70]
    leaf = read(FineGrainedFP8(), ragged, (40, 70), weight_block_size=(32, 32))
    assert torch.equal(decoded(leaf), ragged["weight"].float() * spread)


def test_fbgemm_has_a_scale_per_row():
    tensors = {"weight": fp8_tensors()["weight"], "weight_scale": 1 + drawn(64, 1), "input_scale_ub": torch.ones(1)}
    leaf = read(FineGrainedFP8(), tensors, (64, 96), quant_method="fbgemm_fp8")
    assert leaf.format == FP8()
    assert torch.equal(decoded(leaf), tensors["weight"].float() * tensors["weight_scale"])


def test_fp8_layers_in_memory():
    from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear
    from transformers.integrations.finegrained_fp8 import FP8Linear

    tensors = fp8_tensors()
    layer = FP8Linear(96, 64, block_size=(16, 32), has_bias=True)
    layer.load_state_dict(tensors | {"bias": drawn(64)})
    assert owner(layer) == FineGrainedFP8()
    taken = FineGrainedFP8().take(layer, "layer", torch.bfloat16, {})
    assert_same(taken.weight, read(FineGrainedFP8(), tensors, (64, 96), torch.bfloat16, weight_block_size=(16, 32)))
    assert torch.equal(taken.bias, layer.bias)
    layer = FbgemmFp8Linear(96, 64, False)
    layer.load_state_dict({"weight": tensors["weight"], "weight_scale": 1 + drawn(64, 1)})
    taken = FineGrainedFP8().take(layer, "layer", torch.float32, {})
    assert torch.equal(decoded(taken.weight), tensors["weight"].float() * (1 + drawn(64, 1)))
    dense = FP8Linear(96, 64, block_size=(16, 32))
    dense.weight = nn.Parameter(drawn(64, 96))
    assert owner(dense) is None  # what transformers decoded when it loaded


def test_fp8_layer_of_several_products_is_refused():
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = type("FP8GroupedLinear", (FP8Linear,), {"__module__": FP8Linear.__module__})(96, 64, block_size=(16, 32))
    message = "fp8 at 'up': a layer with its weight as the checkpoint has it is required, got a layer of several products"
    with pytest.raises(ValueError, match=re.escape(message)):
        FineGrainedFP8().take(layer, "up", torch.float32, {})


@pytest.mark.parametrize("fmt", [FP8(block_size=(16, 32)), FP8(block_size="tensor"), FP8(block_size=32)], ids=repr)
def test_fp8_writes_what_it_reads(fmt):
    leaf = fmt.requant(drawn(64, 96))
    assert FineGrainedFP8().refuses(leaf) is None
    tensors, _ = FineGrainedFP8().write(leaf, "layer")
    assert_same(read(FineGrainedFP8(), tensors, (64, 96), **FineGrainedFP8().config({"layer": leaf}, ())), leaf)


# -- folders that transformers loads -----------------------------------------------------------------------------------------

FOLDERS = [(fmt, "compressed-tensors") for fmt in WRITTEN]
FOLDERS += [(FP8(block_size=(16, 32)), "fp8"), (FP8(block_size="tensor"), "fp8"), (FP8(block_size=32), "fp8")]


@pytest.mark.parametrize(("fmt", "library"), FOLDERS, ids=str)
def test_a_written_folder_computes_the_same_in_transformers(fmt, library, tmp_path):
    model, params = quantized(fmt)
    fp.write_quantized(model, params, tmp_path / "m", library=library)
    logits = model(params, IDS).logits
    ours, read_again = loaded_by_us(tmp_path / "m")
    for key, leaf in params.items():
        if isinstance(leaf, fp.Quantized):
            assert_same(read_again[key], leaf)
    assert torch.equal(ours(read_again, IDS).logits, logits)
    assert torch.equal(from_pretrained(tmp_path / "m")(IDS).logits, logits)


@pytest.mark.parametrize("inverse", [True, False])
def test_a_written_bitnet_folder_has_the_same_weights_in_transformers(inverse, tmp_path):
    model, params = quantized(Ternary(inverse=inverse))
    fp.write_quantized(model, params, tmp_path / "m", library="bitnet")
    with eagerly():
        loaded = from_pretrained(tmp_path / "m")
        logits = loaded(IDS).logits
    taken_model, taken = fp.functionalize(loaded)
    for key, leaf in params.items():
        if isinstance(leaf, fp.Quantized):
            assert_same(taken[key], leaf)
    ours = model(params, IDS).logits
    assert torch.equal(taken_model(taken, IDS).logits, ours)
    assert 0 < (logits - ours).abs().max() < 0.05 * ours.abs().max()  # their layers round inputs to eight bits


def test_a_written_aqlm_folder_computes_the_same_in_transformers(tmp_path):
    pytest.importorskip("aqlm")
    model, params = fp.functionalize(llama())
    fmt = Codebook(nbits_per_codebook=10)
    stored = {k: fmt.sample(v) if k.endswith("proj.weight") else v for k, v in params.items()}
    fp.write_quantized(model, stored, tmp_path / "m", library="aqlm")
    loaded = from_pretrained(tmp_path / "m")
    ours, read_again = loaded_by_us(tmp_path / "m")
    taken_model, taken = fp.functionalize(loaded)
    for key, leaf in stored.items():
        if isinstance(leaf, fp.Quantized):
            assert_same(read_again[key], leaf)
            assert_same(taken[key], leaf)
    logits = model(stored, IDS).logits
    assert torch.equal(ours(read_again, IDS).logits, logits)
    assert torch.equal(taken_model(taken, IDS).logits, logits)
    torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-4, atol=1e-5)  # its kernel multiplies in another order


@pytest.mark.parametrize(
    ("fmt", "library"),
    [(AffineInt(block_size=16, packing="gptq"), "gptq"), (AffineInt(block_size=32, packing="awq"), "awq")],
    ids=str,
)
def test_a_written_folder_is_read_without_the_library(fmt, library, tmp_path):
    model, params = quantized(fmt)
    fp.write_quantized(model, params, tmp_path / "m", library=library)
    ours, read_again = loaded_by_us(tmp_path / "m")
    assert torch.equal(ours(read_again, IDS).logits, model(params, IDS).logits)


# -- what cannot be written --------------------------------------------------------------------------------------------------


def leaf_of(fmt, shape=(32, 64), **data):
    leaf = fmt.requant(drawn(*shape))
    return replace(leaf, data={**leaf.data, **data})


GPTQ_GRID, AWQ_GRID = AffineInt(block_size=16, packing="gptq"), AffineInt(block_size=16, packing="awq")
CT_GRID = AffineInt(block_size=16, packing="compressed")
FLOAT_ZEROS = {"zero_point": torch.full((32, 4), 7.5)}
G_IDX = {"g_idx": torch.arange(64, dtype=torch.int32).flip(0) // 16}

REFUSALS = [
    (GPTQ(), leaf_of(NF4()), "gptq stores AffineInt(packing='gptq'), not NF4("),
    (GPTQ(), leaf_of(AWQ_GRID), "gptq stores packing 'gptq', not 'awq': see repack"),
    (GPTQ(), leaf_of(GPTQ_GRID, (2, 32, 64)), "gptq stores matrices, not shape (2, 32, 64)"),
    (
        GPTQ(),
        leaf_of(replace(GPTQ_GRID, block_size=8)),
        "gptq has scales per row or per group of 16, 32, 64, 128, 256, 512, 1024",
    ),
    (GPTQ(), leaf_of(replace(GPTQ_GRID, layout="flat")), "gptq has scales per row or per group of 16, 32,"),
    (GPTQ(), leaf_of(GPTQ_GRID, **FLOAT_ZEROS), "gptq stores integer zeros only"),
    (GPTQ(), leaf_of(GPTQ_GRID, zero_point=torch.full((32, 4), 16)), "gptq stores zeros of at most 15, not 16"),
    (
        GPTQ(checkpoint_format="gptq"),
        leaf_of(GPTQ_GRID, zero_point=torch.zeros(32, 4, dtype=torch.uint8)),
        "checkpoint_format 'gptq' stores zeros less one, so none of 0; use 'gptq_v2'",
    ),
    (AWQ(), leaf_of(GPTQ_GRID), "awq stores packing 'awq', not 'gptq': see repack"),
    (AWQ(), leaf_of(AWQ_GRID, zero_point=torch.full((32, 4), 16)), "awq stores zeros of at most 15, not 16"),
    (AWQ(), leaf_of(AWQ_GRID, **G_IDX), "awq has groups of neighbours only, no act order"),
    (INC(), leaf_of(GPTQ_GRID), 'inc has no loader in transformers; write GPTQ(checkpoint_format="gptq")'),
    (EETQ(), leaf_of(GPTQ_GRID), "transformers loads eetq with CUDA kernels only"),
    (AQLM(), leaf_of(GPTQ_GRID), "aqlm stores Codebook, not AffineInt("),
    (AQLM(), Codebook(nbits_per_codebook=4).sample(drawn(2, 8, 16)), "aqlm stores matrices, not shape (2, 8, 16)"),
    (BitNet(), leaf_of(GPTQ_GRID), "bitnet stores Ternary, not AffineInt("),
    (BitNet(), leaf_of(Ternary(), (30, 64)), "bitnet stores matrices of 4k rows, not shape (30, 64)"),
    (CompressedTensors(), leaf_of(NF4()), "compressed-tensors stores AffineInt(packing='compressed') and FP8, not NF4("),
    (CompressedTensors(), leaf_of(GPTQ_GRID), "compressed-tensors stores packing 'compressed', not 'gptq': see repack"),
    (CompressedTensors(), leaf_of(CT_GRID, (2, 32, 64)), "compressed-tensors stores matrices, not shape (2, 32, 64)"),
    (
        CompressedTensors(),
        leaf_of(replace(CT_GRID, layout="flat")),
        "compressed-tensors has scales per row, group of inputs or",
    ),
    (
        CompressedTensors(),
        leaf_of(replace(CT_GRID, block_size=(2, 16))),
        "compressed-tensors has scales per row, group of inputs",
    ),
    (CompressedTensors(), leaf_of(CT_GRID, **FLOAT_ZEROS), "compressed-tensors stores integer zeros only"),
    (CompressedTensors(), leaf_of(CT_GRID, **G_IDX), "compressed-tensors 0.20 has no act order any more"),
    (
        CompressedTensors(),
        leaf_of(replace(CT_GRID, symmetric=False)),
        "transformers 5.23 does not load what compressed-tensors 0.20",
    ),
    (CompressedTensors(), leaf_of(CT_GRID, (32, 56)), "in_features must be a multiple of block_size 16, not 56"),
    (CompressedTensors(), leaf_of(FP8(kind="e5m2")), "compressed-tensors stores FP8 of kind 'e4m3' only"),
    (CompressedTensors(), leaf_of(FP8(block_size=16)), "compressed-tensors has scales per row, tile or weight for FP8"),
    (FineGrainedFP8(), leaf_of(FP8(kind="e5m2")), "fp8 stores FP8 of kind 'e4m3', not FP8("),
    (FineGrainedFP8(), leaf_of(GPTQ_GRID), "fp8 stores FP8 of kind 'e4m3', not AffineInt("),
    (FineGrainedFP8(), leaf_of(FP8(block_size=(16, 16)), (2, 32, 64)), "fp8 stores matrices, not shape (2, 32, 64)"),
    (FineGrainedFP8(), leaf_of(FP8()), "a scale per row is fbgemm's layout, which transformers loads on a GPU only"),
    (
        FineGrainedFP8(),
        leaf_of(FP8(block_size=(24, 32))),
        "transformers 5.23 decodes tiles that do not divide the weight wrongly",
    ),
]


@pytest.mark.parametrize(("library", "leaf", "reason"), REFUSALS, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_what_a_writer_refuses(library, leaf, reason):
    assert library.refuses(leaf).startswith(reason)


def test_the_packed_zeros_that_are_refused_are_still_not_loaded(tmp_path):
    """The reason for a refusal: where this fails, the refusal can go."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    described = scheme(symmetric=False)
    tensors, _ = compressed(described)
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {"weight": (48, 64), "weight_scale": (48, 4), "weight_zero_point": (48, 4)}
    expected = library.compress(
        {n: torch.empty(s, device="meta") for n, s in state.items()}, QuantizationScheme.model_validate(described)
    )
    assert expected["weight_zero_point"].shape != tensors["weight_zero_point"].shape


def test_transformers_still_decodes_cut_off_tiles_wrongly():
    """The reason for a refusal: where this fails, the refusal can go."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors = fp8_tensors((40, 32), (24, 32))
    leaf = read(FineGrainedFP8(), tensors, (40, 32), weight_block_size=(24, 32))
    theirs = Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"], torch.float32)
    assert not torch.equal(theirs, decoded(leaf))


# -- files that are not what they claim to be --------------------------------------------------------------------------------

_CODES, _ZERO, _SCALE = grid(32, 64, 4, 16)
GPTQ_FILE = gptq_tensors(_CODES, _ZERO, _SCALE, 4, 1, [i // 16 for i in range(64)])
AWQ_FILE = awq_tensors(_CODES, _ZERO, _SCALE)
EETQ_FILE = {"weight": torch.zeros(64, 32, dtype=torch.int8), "weight_scales": torch.ones(32)}
AQLM_FILE = {
    "codes": integers(16, 32, 8, 1, low=-16).to(torch.int8), "codebooks": drawn(1, 32, 1, 8), "scales": torch.ones(32, 1, 1, 1)
}  # fmt: skip
BIT_FILE = {"weight": torch.zeros(8, 64, dtype=torch.uint8), "weight_scale": torch.ones(1)}
FP8_FILE = fp8_tensors((32, 64), (16, 32))
ROW_FILE = {"weight": FP8_FILE["weight"], "weight_scale": torch.ones(32, 1)}
CT_FILE = {
    "weight_packed": words(_CODES, 4), "weight_scale": _SCALE, "weight_shape": torch.tensor([32, 64]),
    "weight_zero_point": words(_ZERO.t(), 4).t().contiguous(),
}  # fmt: skip
CT_BYTES = {
    "weight": torch.zeros(32, 64, dtype=torch.int8), "weight_scale": _SCALE,
    "weight_zero_point": torch.zeros(32, 4, dtype=torch.int8),
}  # fmt: skip
CT_FLOATS = {"weight": FP8_FILE["weight"], "weight_scale": torch.ones(32, 1)}

GPTQ_SAYS = {"bits": 4, "group_size": 16, "checkpoint_format": "gptq"}
AQLM_SAYS = aqlm_config(1, 5, 1, 8)
FP8_SAYS = {"quant_method": "fp8", "weight_block_size": [16, 32]}
CT_SAYS = compressed_config(scheme(symmetric=False))
CT_BYTES_SAYS = compressed_config(scheme(8, symmetric=False, form="int-quantized"))
CT_FLOATS_SAYS = compressed_config(scheme(8, "channel", kind="float", form="float-quantized"))
NAN = torch.tensor(float("nan"))


def without(tensors, name):
    return {n: t for n, t in tensors.items() if n != name}


def spoilt(tensors, name, t):
    return tensors | {name: t}


def first(t, value):
    """Returns a copy with another first entry."""
    t = t.clone()
    t.view(-1)[0] = value
    return t


FILES = [
    (GPTQ(), GPTQ_FILE, GPTQ_SAYS), (AWQ(), AWQ_FILE, GPTQ_SAYS | {"version": "gemm"}), (INC(), GPTQ_FILE, GPTQ_SAYS),
    (EETQ(), EETQ_FILE, {}), (AQLM(), AQLM_FILE, AQLM_SAYS), (BitNet(), BIT_FILE, {}), (FineGrainedFP8(), FP8_FILE, FP8_SAYS),
    (FineGrainedFP8(), ROW_FILE, {"quant_method": "fbgemm_fp8"}), (CompressedTensors(), CT_FILE, CT_SAYS),
    (CompressedTensors(), CT_BYTES, CT_BYTES_SAYS), (CompressedTensors(), CT_FLOATS, CT_FLOATS_SAYS),
]  # fmt: skip
OPTIONAL = {"g_idx", "weight_shape"}


@pytest.mark.parametrize(("library", "tensors", "says"), FILES, ids=lambda v: getattr(v, "name", ""))
def test_every_tensor_must_be_there_in_its_shape_and_dtype(library, tensors, says):
    assert read(library, tensors, (32, 64), **says) is not None
    for name, t in tensors.items():
        if name in OPTIONAL:
            assert_same(read(library, without(tensors, name), (32, 64), **says), read(library, tensors, (32, 64), **says))
        else:
            refused(library, without(tensors, name), (32, 64), f"tensor {name!r} is required", **says)
        refused(library, spoilt(tensors, name, torch.cat([t, t])), (32, 64), f"{name!r} must have", **says)
        refused(library, spoilt(tensors, name, t.new_empty(0)), (32, 64), f"{name!r} must have", **says)
        refused(library, spoilt(tensors, name, t.to(torch.float64)), (32, 64), f"{name!r} must be ", **says)
        if t.dtype in FLOATS:
            for value in ("nan", "inf"):
                refused(library, spoilt(tensors, name, first(t, float(value))), (32, 64), f"{name!r} must be finite", **says)


@pytest.mark.parametrize(("library", "tensors", "says"), FILES, ids=lambda v: getattr(v, "name", ""))
@pytest.mark.parametrize("shape", [(32, 128), (64, 64), (30, 62)], ids=str)
def test_a_layer_of_another_size_is_refused(library, tensors, says, shape):
    with pytest.raises(CheckpointError, match="at 'layer': "):
        read(library, tensors, shape, **says)


@pytest.mark.parametrize(("library", "tensors", "says"), FILES, ids=lambda v: getattr(v, "name", ""))
@pytest.mark.parametrize("shape", [(0, 64), (32, 0)], ids=str)
def test_a_layer_without_entries_is_refused(library, tensors, says, shape):
    empty = {n: t.new_empty([0] * t.ndim) for n, t in tensors.items()}
    with pytest.raises(CheckpointError, match="at 'layer': "):
        read(library, empty, shape, **says)


FINE, COMPRESSED = FineGrainedFP8(), CompressedTensors()
HOSTILE = [
    (GPTQ(), spoilt(GPTQ_FILE, "g_idx", first(GPTQ_FILE["g_idx"], 4)), GPTQ_SAYS, "'g_idx' must be 0 to 3, got (0, 4)."),
    (GPTQ(), spoilt(GPTQ_FILE, "g_idx", first(GPTQ_FILE["g_idx"], -1)), GPTQ_SAYS, "'g_idx' must be 0 to 3, got (-1, 3)."),
    (GPTQ(), GPTQ_FILE, GPTQ_SAYS | {"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5."),
    (GPTQ(), GPTQ_FILE, GPTQ_SAYS | {"bits": "4"}, "bits must be one of 2, 3, 4, 8, got '4'."),
    (GPTQ(), GPTQ_FILE, {"group_size": 16}, "bits must be one of 2, 3, 4, 8, got None."),
    (GPTQ(), GPTQ_FILE, GPTQ_SAYS | {"group_size": 0}, "group_size must be a positive int, or -1 for whole rows, got 0."),
    (GPTQ(), GPTQ_FILE, GPTQ_SAYS | {"group_size": True}, "group_size must be a positive int, or -1 for whole rows, got True."),
    (GPTQ(), GPTQ_FILE, GPTQ_SAYS | {"checkpoint_format": "marlin"}, "checkpoint_format must be one of 'gptq', 'gptq_v2'"),
    (AWQ(), AWQ_FILE, GPTQ_SAYS | {"version": "gemv"}, "version must be one of 'gemm', got 'gemv'."),
    (AWQ(), AWQ_FILE, GPTQ_SAYS | {"bits": 8}, "bits must be one of 4, got 8."),
    (INC(), GPTQ_FILE, GPTQ_SAYS | {"bits": 3}, "bits must be one of 2, 4, 8, got 3."),
    (AQLM(), spoilt(AQLM_FILE, "codes", first(AQLM_FILE["codes"], 16)), AQLM_SAYS, "'codes' must be -16 to 15, got ("),
    (AQLM(), spoilt(AQLM_FILE, "codes", first(AQLM_FILE["codes"], -17)), AQLM_SAYS, "'codes' must be -16 to 15, got (-17"),
    (AQLM(), AQLM_FILE, AQLM_SAYS | {"num_codebooks": 0}, "num_codebooks must be a positive int, got 0"),
    (AQLM(), AQLM_FILE, AQLM_SAYS | {"nbits_per_codebook": 40}, "nbits_per_codebook must be at most 16, got 40"),
    (AQLM(), AQLM_FILE, AQLM_SAYS | {"in_group_size": 7}, "in_features must be a multiple of in_group_size 7"),
    (BitNet(), spoilt(BIT_FILE, "weight", first(BIT_FILE["weight"], 0b00110000)), {}, "'weight' must hold codes 0, 1 and 2"),
    (BitNet(), spoilt(BIT_FILE, "weight_scale", torch.zeros(1)), {}, "'weight_scale' must not be 0, got 0."),
    (BitNet(), spoilt(BIT_FILE, "weight_scale", torch.ones(2)), {}, "'weight_scale' must have one entry, got (2,)."),
    (BitNet(), BIT_FILE, {"linear_class": "linear"}, "linear_class must be one of 'bitlinear', 'autobitlinear', got 'linear'."),
    (BitNet(), BIT_FILE, {"quantization_mode": "on"}, "quantization_mode must be one of 'offline', 'online', got 'on'."),
    (BitNet(), BIT_FILE, {"use_rms_norm": True}, "layers that meet their input as it is are required, got use_rms_norm."),
    (
        BitNet(),
        {"weight": torch.full((32, 64), 0.5), "weight_scale": torch.ones(1)},
        {"linear_class": "autobitlinear"},
        "'weight' must be -1, 0 and 1, got up to 0.5.",
    ),
    (FINE, FP8_FILE, FP8_SAYS | {"weight_block_size": [16]}, "weight_block_size must be two positive ints, got [16]."),
    (FINE, FP8_FILE, FP8_SAYS | {"weight_block_size": [0, 32]}, "weight_block_size must be two positive ints, got [0"),
    (FINE, FP8_FILE, FP8_SAYS | {"weight_block_size": None}, "'weight_scale_inv' must have one entry, got (2, 2)."),
    (
        FINE,
        spoilt(FP8_FILE, "weight_scale_inv", torch.full((2, 2), 255, dtype=torch.uint8)),
        FP8_SAYS,
        "'weight_scale_inv' must be finite, got NaN or infinity.",
    ),
    (COMPRESSED, spoilt(CT_FILE, "weight_shape", torch.tensor([32, 60])), CT_SAYS, "'weight_shape' must be (32, 64), got"),
    (COMPRESSED, spoilt(CT_FILE, "weight_g_idx", torch.full((64,), 4)), CT_SAYS, "'weight_g_idx' must be 0 to 3, got (4"),
    (COMPRESSED, CT_FILE, CT_SAYS | {"config_groups": {}}, "a group of the config must have it among its targets, got"),
    (COMPRESSED, CT_FILE, CT_SAYS | {"config_groups": None}, "a group of the config must have it among its targets, got"),
    (
        COMPRESSED,
        CT_FILE,
        compressed_config(scheme() | {"targets": ["re:("]}),
        "targets must be regular expressions after 're:', got '(': ",
    ),
    (COMPRESSED, CT_FILE, compressed_config(scheme(form="marlin-24")), "format must be one of 'pack-quantized', 'int-q"),
    (COMPRESSED, CT_FILE, compressed_config(scheme() | {"weights": None}), "the config group must have 'weights', got None"),
    (COMPRESSED, CT_FILE, compressed_config(scheme(9)), "num_bits must be one of 1, 2, 3, 4, 5, 6, 7, 8, got 9."),
    (COMPRESSED, CT_FILE, compressed_config(scheme(strategy="token")), "strategy must be one of 'group', 'channel', 'te"),
    (COMPRESSED, CT_FILE, compressed_config(scheme(size=24)), "group_size must divide in_features 64, got 24."),
    (
        COMPRESSED,
        CT_FLOATS,
        compressed_config(scheme(8, "block", kind="float", form="float-quantized", tile=[0, 2])),
        "block_structure must be two positive ints, got [0, 2].",
    ),
    (
        COMPRESSED,
        spoilt(CT_BYTES, "weight_zero_point", torch.full((32, 4), 128)),
        CT_BYTES_SAYS,
        "'weight_zero_point' must be -128 to 127, got (128, 128).",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("library", "tensors", "says", "message"), HOSTILE, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_hostile_files(library, tensors, says, message):
    refused(library, tensors, (32, 64), message, **says)


# -- layers of gptqmodel, by name: the library's own are in test_interop_gptqmodel.py ------------------------------------------


def gptq_layer(kind="GPTQQuantLinear", v2=True, **options):
    """Returns a layer as gptqmodel has them, by its name and its attributes."""
    tensors = AWQ_FILE if kind == "AWQuantLinear" else gptq_tensors(_CODES, _ZERO, _SCALE, 4, 0)
    made = type(kind, (nn.Module,), {"__module__": "gptqmodel.nn_modules.qlinear", "REQUIRES_FORMAT_V2": v2})()
    for name, t in tensors.items():
        made.register_buffer(name, t)
    made.bits, made.group_size, made.in_features, made.out_features, made.bias = 4, 16, 64, 32, None
    for name, value in options.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(("library", "kind"), [(GPTQ(), "GPTQQuantLinear"), (AWQ(), "AWQuantLinear")], ids=["gptq", "awq"])
def test_layers_of_gptqmodel_are_taken_as_they_are_or_refused(library, kind):
    layer = gptq_layer(kind)
    assert owner(layer) == library
    taken = library.take(layer, "up", torch.float16, {})
    assert torch.equal(decoded(taken.weight), entries(_CODES, _ZERO, _SCALE, [i // 16 for i in range(64)]).half())
    rule = f"{library.name} at 'up': a layer with its weight as the checkpoint has it is required, got "
    ran = types.SimpleNamespace(__str__=lambda: "inference")
    cases = [
        (
            {"linear_mode": "inference"},
            "a forward has repacked its weight; take it before the first forward, or from the file.",
        ),
        ({"qweight": torch.zeros(4, dtype=torch.uint8)}, "a forward has repacked its weight"),
        ({"adapter": ran}, "a layer with an adapter"),
        ({"had_K": torch.ones(1)}, "a layer that rotates its input"),
    ]
    for options, found in cases:
        with pytest.raises(ValueError, match=re.escape(rule + found)):
            library.take(gptq_layer(kind, **options), "up", torch.float16, {})


def test_layers_of_gptqmodel_in_other_layouts_are_refused():
    with pytest.raises(ValueError, match=re.escape("got the layout of the kernel GPTQQuantLinear; take it from the file.")):
        GPTQ().take(gptq_layer(v2=False), "up", torch.float16, {})
    with pytest.raises(ValueError, match=re.escape("got bits in planes; take it from a checkpoint of format 'gptq_v2'.")):
        GPTQ().take(gptq_layer(planar=True), "up", torch.float16, {})


def test_hooks_of_compressed_tensors_do_not_run_in_the_function(tmp_path):
    pytest.importorskip("compressed_tensors")
    model, params = quantized(AffineInt(block_size=32, packing="compressed"))
    fp.write_quantized(model, params, tmp_path / "m", library="compressed-tensors")
    loaded = from_pretrained(tmp_path / "m")
    hooks = len(loaded._forward_pre_hooks)
    taken_model, taken = fp.functionalize(loaded)
    assert len(loaded._forward_pre_hooks) == hooks

    def gradient(of, leaves):
        net = fp.adapt(of, fp.LoRA(r=2, target_modules=["q_proj"]))
        adapter = net.init(leaves, 0)

        def loss(p):
            return net(leaves, adapter.replace(params=p), input_ids=IDS).logits.square().sum()

        return torch.func.grad(loss)(adapter.params)

    got, want = gradient(taken_model, taken), gradient(model, params)
    for path, leaves in want.items():
        for name, t in leaves.items():
            assert torch.equal(got[path][name], t)
