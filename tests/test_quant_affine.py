"""Integer formats: packings against the libraries' own and hand-written ones, decoding bit for bit, the laws of a grid."""

import re

import pytest
import torch
from torch import nn

from funcpeft.quant.affineint import AffineInt, repack
from funcpeft.quant.nf4 import NF4
from funcpeft.quant.packing import PACKINGS
from funcpeft.storage import Quantized

SHAPES = [(8, 32), (16, 64), (5, 7), (24, 96), (8, 40)]
ULPS = 4 * torch.finfo(torch.float32).eps  # codes are found in float32
LAYOUTS = [(name, bits) for name, packing in PACKINGS.items() for bits in packing.bits]


def drawn(*shape, seed=0, dtype=torch.float32):
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def coded(rows, columns, bits, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=gen)


def same(a, b):
    return a.data.keys() == b.data.keys() and all(torch.equal(t, b.data[n]) for n, t in a.data.items())


def fixed(q):
    """Whether storing what is decoded on the same grid gives the same codes."""
    return same(q.format.requant(q.format.dequant(q), like=q), q)


# -- packings ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bits"), LAYOUTS)
def test_unpacking_inverts_packing(name, bits):
    packing, tried = PACKINGS[name], 0
    for rows, columns in SHAPES:
        if packing.misfit(rows, columns, bits):
            continue
        codes = coded(rows, columns, bits)
        before = codes.clone()
        stored = packing.pack(codes, bits)
        assert stored.is_contiguous()
        assert torch.equal(packing.unpack(stored, bits, rows, columns), codes)
        mapped = torch.func.vmap(lambda t, r=rows, c=columns: packing.unpack(t, bits, r, c))(torch.stack([stored] * 2))
        assert torch.equal(mapped, torch.stack([codes] * 2))
        assert torch.equal(codes, before)
        tried += 1
    assert tried >= 2


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_nibbles_hold_the_earlier_entry_in_the_lower_bits(bits):
    codes = coded(3, 13, bits)
    per = 8 // bits
    want = [
        [sum(int(c) << (bits * k) for k, c in enumerate(row[i : i + per])) for i in range(0, 13, per)] for row in codes.tolist()
    ]
    assert PACKINGS["nibbles"].pack(codes, bits).tolist() == want


def gptq_by_hand(codes, bits):
    """Packs as the GPTQ papers' code does, one bit after another: columns are inputs, each output a column of words."""
    rows, columns = codes.shape
    words = [[0] * rows for _ in range(columns * bits // 32)]
    for o in range(rows):
        for i in range(columns):
            for b in range(bits):
                at = i * bits + b
                words[at // 32][o] |= (int(codes[o, i]) >> b & 1) << (at % 32)
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def awq_by_hand(codes):
    rows, columns = codes.shape
    words = [[0] * (rows // 8) for _ in range(columns)]
    for i in range(columns):
        for o in range(rows):
            words[i][o // 8] |= int(codes[o, i]) << (4 * [0, 2, 4, 6, 1, 3, 5, 7].index(o % 8))
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_words_are_those_of_a_loop(bits):
    codes = coded(8, 64, bits)
    stored = PACKINGS["gptq"].pack(codes, bits)
    assert stored.dtype == torch.int32
    assert torch.equal(stored, gptq_by_hand(codes, bits))


def test_awq_words_are_those_of_a_loop():
    codes = coded(24, 5, 4)
    stored = PACKINGS["awq"].pack(codes, 4)
    assert stored.dtype == torch.int32
    assert torch.equal(stored, awq_by_hand(codes))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [32, 40, 64])
def test_compressed_words_are_those_of_the_library(bits, columns):
    ct = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = coded(6, columns, bits)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    stored = PACKINGS["compressed"].pack(codes, bits)
    assert torch.equal(stored, ct.pack_to_int32(signed, bits))
    assert torch.equal(ct.unpack_from_int32(stored, bits, torch.Size((6, columns))), signed)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_hqq_blocks_are_those_of_the_library(bits):
    bitpack = pytest.importorskip("hqq.core.bitpack").BitPack
    codes = coded(24, 5, bits)
    theirs = getattr(bitpack, "pack_3bit_32" if bits == 3 else f"pack_{bits}bit_u8")(codes)
    stored = PACKINGS["hqq"].pack(codes, bits)
    assert stored.dtype == theirs.dtype
    assert torch.equal(stored, theirs)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rows", [8, 7])
def test_quanto_blocks_are_those_of_the_library(bits, rows):
    quanto = pytest.importorskip("optimum.quanto.tensor.packed")
    codes = coded(rows, 5, bits)
    assert torch.equal(PACKINGS["quanto"].pack(codes, bits), quanto.pack_weights(codes, bits))


# -- against the libraries ---------------------------------------------------------------------------------------------------


def torchao_tensor(w, config):
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    with torch.no_grad():
        layer.weight.copy_(w)
    quantization.quantize_(layer, config)
    tensor = layer.weight
    return tensor, {n: getattr(tensor, n) for n in tensor.__tensor_flatten__()[0]}  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_rows_are_those_of_torchao(dtype):
    quantization = pytest.importorskip("torchao.quantization")
    w = drawn(24, 96, dtype=dtype)
    tensor, leaves = torchao_tensor(w, quantization.Int8WeightOnlyConfig())
    fmt = AffineInt(bits=8, block_size="row", packing="int8")
    q = Quantized({"qdata": leaves["qdata"], "scale": leaves["scale"]}, fmt, w.shape, dtype)
    assert torch.equal(fmt.dequant(q), tensor.dequantize())
    assert fixed(q)
    if dtype == torch.float32:  # it finds scales in the weight's dtype, we in float32
        assert same(fmt.requant(w), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_integer_groups_are_those_of_torchao(bits, symmetric, dtype):
    quantization = pytest.importorskip("torchao.quantization")
    mapping = pytest.importorskip("torchao.quantization.quant_primitives").MappingType
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=quantization.PerGroup(32),
        mapping_type=mapping.SYMMETRIC if symmetric else mapping.ASYMMETRIC,
    )
    w = drawn(24, 96, seed=bits, dtype=dtype)
    tensor, leaves = torchao_tensor(w, config)
    fmt = AffineInt(bits=bits, block_size=32, symmetric=symmetric, packing="int8")
    data = {"qdata": leaves["qdata"], "scale": leaves["scale"]}
    if not symmetric:
        data["zero_point"] = (leaves["zero_point"].to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    q = Quantized(data, fmt, w.shape, dtype)
    assert torch.equal(fmt.dequant(q), tensor.dequantize())
    assert fixed(q)
    if dtype == torch.float32 and (bits, symmetric) != (1, True):
        assert same(fmt.requant(w), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (96, 80)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_hqq_decodes_bit_for_bit(bits, axis, shape, dtype):
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    w = drawn(*shape, seed=bits)
    codes, meta = quantizer.quantize(w, nbits=bits, group_size=64, axis=axis, device="cpu", compute_dtype=dtype)
    codes, meta = quantizer.to_inplace(codes, {**meta, "compute_dtype": dtype}, "cpu")
    layout = "flat" if axis else "strided"
    fmt = AffineInt(bits=bits, block_size=64, symmetric=False, packing="hqq", layout=layout)
    data = {"qdata": codes, "scale": meta["scale"], "zero_point": meta["zero"]}
    q = Quantized(data, fmt, w.shape, dtype)
    assert {t.dtype for n, t in data.items() if n != "qdata"} == {dtype}
    assert torch.equal(fmt.dequant(q), quantizer.dequantize(codes, meta))
    assert fixed(q)
    again = fmt.requant(w, like=q)
    inner = (fmt.codes(again) > 0) & (fmt.codes(again) < 2**bits - 1)  # the others may lie beyond the grid
    assert ((fmt.decode(again).reshape(shape) - w).abs() <= fmt.step(q) + ULPS * w.abs())[inner].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 256), (24, 96)], ids=str)
@pytest.mark.parametrize("kind", ["qint8", "qint4", "qint2"])
def test_quanto_decodes_bit_for_bit(kind, shape, dtype):
    quanto = pytest.importorskip("optimum.quanto")
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(drawn(*shape))
    layer = quanto.QLinear.from_module(layer, weights=getattr(quanto, kind))
    layer.freeze()
    tensor = layer.weight
    data = {"scale": tensor._scale.reshape(-1, 1)}
    if kind == "qint8":
        fmt, data["qdata"] = AffineInt(bits=8, block_size="row", packing="int8"), tensor._data
    else:
        group = tensor._group_size  # None for a small matrix
        fmt = AffineInt(bits=int(kind[-1]), block_size=group or "row", packing="quanto", layout="flat" if group else "matrix")
        data |= {"qdata": tensor._data._data, "shift": tensor._shift}
    q = Quantized(data, fmt, torch.Size(shape), dtype)
    assert torch.equal(fmt.dequant(q), tensor.dequantize())
    assert fixed(q)
    if dtype == torch.float32:
        assert float(fmt.clipped(drawn(*shape), q)) == 0
        assert torch.equal(fmt.requant(drawn(*shape), like=q).data["qdata"], data["qdata"])
        if kind != "qint8":
            scale, zero = fmt.grid(q)
            columns = shape[1] // scale.shape[1]
            spread = [t.repeat_interleave(columns, 1) for t in (scale, zero)]
            torch.testing.assert_close((fmt.codes(q) - spread[1]) * spread[0], fmt.dequant(q), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_decodes_bit_for_bit(bits, act_order):
    rows, columns, group = 16, 64, 32
    gen = torch.Generator().manual_seed(bits)
    codes = coded(rows, columns, bits)
    scales = torch.rand(columns // group, rows, generator=gen).to(torch.float16) / 100
    zeros = torch.randint(0, 2**bits + 1, (columns // group, rows), generator=gen)
    order = torch.arange(columns, dtype=torch.int32) // group
    if act_order:
        order = order[torch.randperm(columns, generator=gen)]
    want = torch.zeros(rows, columns, dtype=torch.float16)
    for o in range(rows):
        for i in range(columns):
            g = int(order[i])
            want[o, i] = scales[g, o] * (int(codes[o, i]) - int(zeros[g, o]))
    fmt = AffineInt(bits=bits, block_size=group, symmetric=False, packing="gptq")
    data = {"qdata": gptq_by_hand(codes, bits), "scale": scales.t(), "zero_point": zeros.t().to(torch.int16)}
    if act_order:
        data["g_idx"] = order
    q = Quantized(data, fmt, torch.Size((rows, columns)), torch.float16)
    assert torch.equal(fmt.dequant(q), want)
    assert torch.equal(fmt.codes(q), codes)
    assert fixed(q)
    assert torch.equal(fmt.step(q), (scales.t().float() / 2)[:, order.long()])
    scale, zero = fmt.grid(q)
    index = torch.arange(columns) // (columns // scale.shape[1])
    torch.testing.assert_close((codes - zero[:, index]) * scale[:, index], fmt.decode(q), rtol=0, atol=0)
    assert scale.shape == (rows, columns if act_order else columns // group)
    moved = fmt.requant(fmt.decode(q) + 0.3 * fmt.step(q), like=q)  # less than half a cell
    assert torch.equal(moved.data["qdata"], q.data["qdata"])
    assert moved.data["scale"] is q.data["scale"]


def test_awq_decodes_bit_for_bit():
    rows, columns, group = 16, 64, 32
    codes = coded(rows, columns, 4)
    scales = torch.rand(rows, 2, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    zeros = coded(rows, 2, 4, seed=1)
    fmt = AffineInt(block_size=group, symmetric=False, packing="awq")
    data = {"qdata": awq_by_hand(codes), "scale": scales, "zero_point": zeros}
    q = Quantized(data, fmt, torch.Size((rows, columns)), torch.float16)
    want = (codes.to(torch.float16) - zeros.repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)
    assert torch.equal(fmt.dequant(q), want)
    assert fixed(q)


# -- the format --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", AffineInt.examples(), ids=repr)
@pytest.mark.parametrize("shape", [(16, 32), (8, 8, 8), (8, 4, 2, 4)], ids=str)
def test_an_error_is_at_most_the_step_and_the_grid_keeps_codes(fmt, shape):
    w = drawn(*shape)
    w.view(-1)[:8] = 0
    q = fmt.requant(w)
    back, step = fmt.dequant(q), fmt.step(q)
    assert (back.shape, step.shape, back.dtype) == (w.shape, w.shape, torch.float32)
    assert ((back - w).abs() <= step + ULPS * w.abs()).all()
    assert float(fmt.clipped(w, q)) == 0
    assert fixed(q)
    assert same(fmt.requant(w, like=q), q)
    assert fmt.from_dict(fmt.to_dict()) == fmt
    assert q.data["scale"].dtype == torch.float32
    assert fmt.codes(q).dtype == torch.uint8
    assert int(fmt.codes(q).max()) <= 2**fmt.bits - 1


@pytest.mark.parametrize("fmt", AffineInt.examples(), ids=repr)
def test_zeros_are_exact(fmt):
    q = fmt.requant(torch.zeros(8, 16))
    assert not fmt.dequant(q).any()
    assert not fmt.step(q).any()
    assert fixed(q)


@pytest.mark.parametrize("fmt", [AffineInt(bits=b, symmetric=s) for b in (1, 4) for s in (True, False)], ids=repr)
def test_the_smallest_numbers_are_finite(fmt):
    back = fmt.dequant(fmt.requant(torch.full((2, 32), 1e-44)))
    assert back.isfinite().all()
    assert float(back.abs().max()) < 1e-37


def test_one_symmetric_bit_has_two_levels_about_zero():
    fmt = AffineInt(bits=1, block_size="row")
    q = fmt.requant(torch.tensor([[4.0, -1.0, 0.5, -3.0]]))
    assert fmt.dequant(q).tolist() == [[2.0, -2.0, 2.0, -2.0]]
    assert fmt.step(q).tolist() == [[2.0] * 4]


@pytest.mark.parametrize(
    ("fmt", "shape"),
    [
        (AffineInt(block_size=32), (4, 80)),
        (AffineInt(bits=8, block_size=(4, 16), symmetric=False), (6, 24)),
        (AffineInt(bits=3, block_size=8, packing="compressed"), (3, 13)),
        (AffineInt(block_size=64), (2, 5)),
        (AffineInt(block_size="tensor"), (7,)),
    ],
    ids=repr,
)
def test_blocks_need_not_divide_the_matrix(fmt, shape):
    w = drawn(*shape)
    q = fmt.requant(w)
    assert ((fmt.dequant(q) - w).abs() <= fmt.step(q) + ULPS * w.abs()).all()
    assert fixed(q)


def test_a_block_is_what_the_layout_says():
    w = drawn(6, 8)
    scales = {
        layout: AffineInt(bits=8, block_size=12, layout=layout).requant(w).data["scale"] for layout in ("flat", "strided")
    }
    assert torch.equal(scales["flat"], w.reshape(4, 12).abs().amax(1, keepdim=True) / 127.5)
    assert torch.equal(scales["strided"], w.reshape(12, 4).abs().amax(0, keepdim=True) / 127.5)
    tiles = AffineInt(bits=8, block_size=(3, 4)).requant(w).data["scale"]
    assert torch.equal(tiles, w.reshape(2, 3, 2, 4).abs().amax((1, 3)) / 127.5)


def test_the_default_packing_is_compact():
    assert [AffineInt(bits=b).packing for b in (1, 2, 3, 4, 8)] == ["nibbles", "nibbles", "bytes", "nibbles", "bytes"]
    assert AffineInt().requant(drawn(8, 64)).nbytes == 8 * 64 // 2 + 8 * 2 * 4


# -- grids and repacking -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fmt",
    [
        AffineInt(block_size=8),
        AffineInt(bits=1, block_size=8),
        AffineInt(bits=8, block_size="row", symmetric=False),
        AffineInt(block_size="tensor"),
        AffineInt(bits=3, block_size=(4, 8), symmetric=False),
        AffineInt(block_size=8, layout="flat", packing="hqq"),
    ],
    ids=repr,
)
def test_a_grid_and_codes_give_the_weight(fmt):
    q = fmt.requant(drawn(6, 32))
    scale, zero = fmt.grid(q)
    assert (scale.shape, scale.dtype, zero.dtype) == (zero.shape, torch.float32, torch.float32)
    index = torch.arange(32) // (32 // scale.shape[1])
    assert torch.equal((fmt.codes(q) - zero[:, index]) * scale[:, index], fmt.dequant(q))


@pytest.mark.parametrize("fmt", [AffineInt(block_size=8, layout="strided"), AffineInt(block_size=12, layout="flat")], ids=repr)
def test_a_grid_needs_blocks_within_rows(fmt):
    with pytest.raises(TypeError, match=r"affineint: blocks within rows are required, got layout '\w+' of 6 x 32; use layout="):
        fmt.grid(fmt.requant(drawn(6, 32)))


@pytest.mark.parametrize(("name", "bits"), LAYOUTS)
@pytest.mark.parametrize("layout", ["matrix", "flat", "strided"])
def test_repacking_keeps_the_codes(name, bits, layout):
    fmt = AffineInt(bits=bits, block_size=32, packing="bytes", layout=layout, symmetric=False)
    q = fmt.requant(drawn(32, 64))
    other = repack(q, name)
    assert other.format.packing == name
    assert torch.equal(other.format.codes(other), fmt.codes(q))
    assert torch.equal(other.format.dequant(other), fmt.dequant(q))
    assert same(repack(other, "bytes"), q)


def test_repacking_says_what_does_not_fit():
    q = AffineInt().requant(drawn(6, 32))
    with pytest.raises(ValueError, match=r"packing 'awq' requires a multiple of 8 rows, got \(6, 32\); keep the packing"):
        repack(q, "awq")
    with pytest.raises(ValueError, match="packing must be one of 'bytes', 'int8', 'compressed', 'gptq', 'hqq' for 3 bits"):
        repack(AffineInt(bits=3).requant(drawn(6, 32)), "nibbles")
    with pytest.raises(TypeError, match="repack: a weight stored as AffineInt is required, got NF4"):
        repack(NF4().requant(drawn(6, 32)), "bytes")


# -- transforms --------------------------------------------------------------------------------------------------------------

TRANSFORMED = [
    AffineInt(block_size=8),
    AffineInt(bits=3, block_size=8, symmetric=False, packing="gptq"),
    AffineInt(block_size=8, symmetric=False, packing="awq"),
    AffineInt(bits=1, block_size=8, layout="strided", packing="hqq"),
]


def decoded(q, **data):
    return q.format.dequant(Quantized({**q.data, **data}, q.format, q.shape, q.dtype))


@pytest.mark.parametrize("fmt", TRANSFORMED, ids=repr)
def test_decoding_maps_over_any_of_its_tensors(fmt):
    qs = [fmt.requant(drawn(8, 32, seed=s)) for s in range(3)]
    stacked = {n: torch.stack([q.data[n] for q in qs]) for n in qs[0].data}
    every = torch.func.vmap(lambda d: decoded(qs[0], **d))(stacked)
    assert torch.equal(every, torch.stack([fmt.dequant(q) for q in qs]))
    for name, stack in stacked.items():
        one = torch.func.vmap(lambda t, n=name: decoded(qs[0], **{n: t}))(stack)
        assert torch.equal(one, torch.stack([decoded(qs[0], **{name: t}) for t in stack]))


@pytest.mark.parametrize("fmt", TRANSFORMED, ids=repr)
def test_decoding_differentiates_by_its_scales(fmt):
    q = fmt.requant(drawn(8, 32))
    scale = q.data["scale"]
    backward = torch.func.jacrev(lambda s: decoded(q, scale=s))(scale)
    forward = torch.func.jacfwd(lambda s: decoded(q, scale=s))(scale)
    torch.testing.assert_close(backward, forward)
    torch.testing.assert_close(torch.einsum("...ab,ab->...", backward, scale), fmt.dequant(q))  # linear in the scales
    leaf = scale.clone().requires_grad_()
    decoded(q, scale=leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, backward.sum((0, 1)))


@pytest.mark.parametrize("fmt", TRANSFORMED, ids=repr)
def test_decoding_compiles(fmt):
    q = fmt.requant(drawn(8, 32))
    compiled = torch.compile(lambda d: decoded(q, **d), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(dict(q.data)), fmt.dequant(q))


def test_act_order_maps_and_compiles():
    fmt = AffineInt(block_size=8, packing="gptq")
    q = fmt.requant(drawn(8, 32))
    orders = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(s)) // 8 for s in range(3)]).int()
    mapped = torch.func.vmap(lambda g: decoded(q, g_idx=g))(orders)
    assert torch.equal(mapped, torch.stack([decoded(q, g_idx=g) for g in orders]))
    compiled = torch.compile(lambda g: decoded(q, g_idx=g), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(orders[0]), mapped[0])


# -- messages ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"bits": 9}, "affineint: bits must be 1 to 8, got 9"),
        ({"bits": True}, "bits must be 1 to 8, got True"),
        ({"block_size": 0}, "block_size must be 'tensor', 'row', a positive int or a pair of them, got 0"),
        ({"symmetric": 1}, "symmetric must be True or False, got 1"),
        ({"packing": "nibble"}, "packing must be one of 'bytes', .* for 4 bits, got 'nibble'"),
        ({"bits": 8, "packing": "awq"}, "packing must be one of 'bytes', 'int8', 'compressed', 'gptq', 'hqq' for 8 bits, got"),
        ({"layout": "rows"}, "layout must be one of 'matrix', 'flat', 'strided', got 'rows'"),
        ({"layout": "flat", "block_size": "row"}, "block_size must be an int with layout 'flat', got 'row'"),
    ],
)
def test_fields_are_checked(fields, text):
    with pytest.raises(ValueError, match=text):
        AffineInt(**fields)


@pytest.mark.parametrize(
    ("fmt", "shape", "text"),
    [
        (AffineInt(), (0, 4), "a weight with entries is required, got (0, 4); leave the weight dense"),
        (AffineInt(layout="flat"), (5, 7), "the number of entries must be a multiple of block_size 32, got (5, 7)"),
        (AffineInt(packing="gptq"), (8, 12), "packing 'gptq' requires a multiple of 8 columns, got (8, 12)"),
        (AffineInt(bits=3, packing="gptq"), (8, 24), "packing 'gptq' requires a multiple of 32 columns, got (8, 24)"),
        (AffineInt(packing="awq"), (12, 8), "packing 'awq' requires a multiple of 8 rows, got (12, 8)"),
        (AffineInt(bits=2, packing="hqq"), (6, 8), "packing 'hqq' requires a multiple of 4 rows, got (6, 8)"),
    ],
    ids=repr,
)
def test_a_shape_that_does_not_fit_is_refused(fmt, shape, text):
    assert not fmt.fits(shape)
    with pytest.raises(ValueError, match=re.escape(text)):
        fmt.requant(torch.ones(shape))


def test_levels_that_coincide_keep_their_codes():
    fmt = AffineInt(bits=8, block_size="row", symmetric=False)
    codes = torch.arange(256, dtype=torch.uint8)[None]
    flat = Quantized({"qdata": codes, "scale": torch.zeros(1, 1)}, fmt, torch.Size((1, 256)), torch.float32)
    zero = torch.tensor([[-40.25]], dtype=torch.bfloat16)
    half = Quantized({**flat.data, "scale": torch.ones(1, 1), "zero_point": zero}, fmt, flat.shape, torch.bfloat16)
    assert len(fmt.dequant(half).unique()) < 256
    assert fixed(flat)
    assert fixed(half)
    assert float(fmt.step(half).max()) == 0.5 + 2 * 2**-7 * 296  # 295.25 in bfloat16
