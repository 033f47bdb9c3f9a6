"""FP8, NVFP4, MXFP4 and MXFP8: equal to torchao and transformers bit for bit, errors within the step, exact exponents."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from funcpeft.quant.blocks import matrix_shape, tile_of
from funcpeft.quant.fp8 import FP8
from funcpeft.quant.minifloat import E2M1, FLOAT8, Microscaling, e8m0_values, quotient
from funcpeft.quant.mxfp4 import MXFP4
from funcpeft.quant.mxfp8 import MXFP8
from funcpeft.quant.nvfp4 import NVFP4, swizzled, unswizzled
from funcpeft.storage import Quantized
from funcpeft.tree import tree_map

pytestmark = pytest.mark.filterwarnings("ignore:.*Enum subclass:UserWarning")

FP8S = [FP8(), FP8(block_size="tensor"), FP8(block_size=32), FP8(block_size=(5, 48)), FP8(kind="e5m2")]
MX = [MXFP4(), MXFP8(), MXFP8(kind="e5m2")]
NV = [NVFP4(), NVFP4(per_tensor=False)]
FORMATS = [*FP8S, *NV, *MX]
SHAPES = [(64, 64), (24, 96), (3, 2, 64), (4, 8, 2, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drawn(*shape, seed=0, dtype=torch.float32, size=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def raw(t):
    """The bytes of a tensor: torch 2.13 compares no float8, and signs of zeros and kinds of NaN count."""
    return t.contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    assert a.dtype == b.dtype
    assert torch.equal(raw(a), raw(b))
    assert a.shape == b.shape


def same_stored(a, b):
    assert a.data.keys() == b.data.keys()
    for name, tensor in a.data.items():
        same(tensor, b.data[name])


def leaves(stored):
    return {n: getattr(stored, n) for n in stored.__tensor_flatten__()[0]}


def levels(fmt):
    if isinstance(fmt, (MXFP4, NVFP4)):
        return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    dtype = torch.float8_e4m3fn if fmt.kind == "e4m3" else torch.float8_e5m2
    found = torch.arange(128, dtype=torch.uint8).view(dtype).to(torch.float64)
    return found[found.isfinite()]


# -- against torchao ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.parametrize("block", ["row", "tensor", 16])
@pytest.mark.parametrize("shape", [(64, 64), (96, 80), (128, 256)], ids=str)
def test_fp8_codes_and_scales_are_those_of_torchao(shape, block, kind):
    ao = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor

    w = drawn(*shape, seed=sum(shape), size=0.02)
    layer = nn.Linear(*reversed(shape), bias=False)
    layer.weight = nn.Parameter(w)
    granularity = {"row": PerRow(), "tensor": PerTensor(), 16: PerGroup(16)}[block]
    dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    ao.quantize_(layer, ao.Float8WeightOnlyConfig(weight_dtype=dtype, granularity=granularity))
    fmt = FP8(block_size=block, kind=kind)
    ours, theirs = fmt.requant(w), leaves(layer.weight)
    same(ours.data["qdata"], theirs["qdata"])
    same(ours.data["scale"], theirs["scale"])
    same(fmt.dequant(ours), layer.weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp8_decodes_to_half_precision_as_torchao_does(dtype):
    ao = pytest.importorskip("torchao.quantization.quantize_.workflows.float8.float8_tensor")
    w = drawn(64, 96, dtype=dtype)
    theirs = ao.Float8Tensor.from_hp(w)
    same(FP8().dequant(Quantized(leaves(theirs), FP8(), w.shape, dtype)), theirs.dequantize())
    # torchao fits the scale in the weight's dtype, this in float32: the same but for that rounding
    torch.testing.assert_close(FP8().requant(w).data["scale"], theirs.scale, rtol=torch.finfo(dtype).eps, atol=0)


def test_of_a_row_of_zeros_torchao_makes_nan_and_fp8_zeros():
    ao = pytest.importorskip("torchao.quantization.quantize_.workflows.float8.float8_tensor")
    w = drawn(3, 16)
    w[1] = 0
    theirs = ao.Float8Tensor.from_hp(w)
    assert theirs.dequantize()[1].isnan().all()
    assert FP8().dequant(Quantized(leaves(theirs), FP8(), w.shape, w.dtype))[1].isnan().all()
    assert not FP8().dequant(FP8().requant(w))[1].any()


@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (96, 80), (130, 48), (256, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nvfp4_is_that_of_torchao(shape, per_tensor, dtype):
    ao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    w = drawn(*shape, seed=sum(shape), size=0.02, dtype=dtype)
    whole = ao.per_tensor_amax_to_scale(w.abs().max()) if per_tensor else None
    theirs = ao.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=whole, is_swizzled_scales=True)
    data = leaves(theirs)
    data["scale"] = unswizzled(data["scale"], shape[0], shape[1] // 16)
    fmt = NVFP4(per_tensor=per_tensor)
    stored = Quantized(data, fmt, w.shape, dtype)
    same(fmt.dequant(stored), theirs.dequantize())
    same(swizzled(data["scale"]), theirs.scale)
    ours = fmt.requant(w)
    if dtype == torch.float32:
        same_stored(ours, stored)
    else:  # of few bits come quotients in the middle of two levels, and torchao multiplies by a reciprocal
        assert ours.data.keys() == data.keys()
        same(ours.data["scale"], data["scale"])
        assert float((ours.data["qdata"] != data["qdata"]).double().mean()) < 0.01


def test_nvfp4_weight_only_of_torchao_is_read_from_a_layer():
    ao = pytest.importorskip("torchao.quantization")
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

    layer = nn.Linear(96, 80, bias=False)
    w = layer.weight.detach().clone()
    ao.quantize_(layer, NVFP4WeightOnlyConfig())
    data = leaves(layer.weight)
    data["scale"] = unswizzled(data["scale"], 80, 6)
    same_stored(NVFP4().requant(w), Quantized(data, NVFP4(), w.shape, w.dtype))


def test_nvfp4_decodes_experts_with_a_scale_each():
    ao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    w = drawn(3, 8, 64) * torch.tensor([1.0, 10, 0.1])[:, None, None]
    whole = ao.per_tensor_amax_to_scale(w.abs().amax((1, 2)))
    theirs = ao.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=whole[:, None, None])
    data = {"qdata": theirs.qdata.reshape(24, 32), "scale": theirs.scale.reshape(24, 4), "per_tensor_scale": whole}
    stored = Quantized(data, NVFP4(), w.shape, w.dtype)
    same(NVFP4().dequant(stored), theirs.dequantize())
    same_stored(NVFP4().requant(theirs.dequantize(), like=stored), stored)
    assert ((NVFP4().dequant(stored) - w).abs() <= NVFP4().step(stored) * (1 + 1e-6)).all()


@pytest.mark.parametrize("fmt", MX, ids=repr)
@pytest.mark.parametrize("shape", [(64, 64), (96, 160), (2, 5, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mx_is_that_of_torchao(fmt, shape, dtype):
    ao = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    element = {"e2m1": torch.float4_e2m1fn_x2, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    w = drawn(*shape, seed=sum(shape), size=0.02, dtype=dtype)
    w[..., 1, :] = 0
    theirs = ao.MXTensor.to_mx(w, element[getattr(fmt, "kind", "e2m1")], 32)
    ours = fmt.requant(w)
    assert torch.equal(raw(ours.data["qdata"]), raw(theirs.qdata))
    assert torch.equal(raw(ours.data["scale"]), raw(theirs.scale))
    same(fmt.dequant(ours), theirs.dequantize(dtype))


@pytest.mark.parametrize("shape", [(128, 4), (256, 12), (130, 5), (1, 1), (127, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8], ids=str)
def test_the_swizzle_is_that_of_torchao_and_inverts(shape, dtype):
    ao = pytest.importorskip("torchao.prototype.mx_formats.utils")
    bytes_ = torch.randint(0, 255, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    scale = bytes_.view(dtype)
    got = swizzled(scale)
    assert got.dtype == dtype
    assert got.shape == (32 * math.ceil(shape[0] / 128), 16 * math.ceil(shape[1] / 4))
    assert torch.equal(raw(got), ao.to_blocked(bytes_))
    for form in (got, got.reshape(-1)):
        same(unswizzled(form, *shape), scale)
    assert torch.equal(raw(unswizzled(got, *shape)), raw(ao.from_blocked(raw(got), *shape)))


# -- against transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mxfp4_decodes_experts_as_transformers_does(dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    gen = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8, generator=gen)
    scales = torch.randint(0, 252, (3, 10, 4), dtype=torch.uint8, generator=gen)
    data = {"qdata": blocks.reshape(30, 64), "scale": scales.reshape(30, 4)}
    ours = MXFP4().dequant(Quantized(data, MXFP4(), torch.Size((3, 10, 128)), dtype))
    same(ours, convert_moe_packed_tensors(blocks, scales, dtype=dtype).mT.contiguous())


@pytest.mark.parametrize("fmt", [FP8(block_size=(16, 32)), MXFP8(), MXFP8(kind="e5m2")], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_decode_as_the_fine_grained_reader_of_transformers_does(fmt, dtype):
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    reader = getattr(module, "Fp8Dequantize", None)
    if reader is None:
        pytest.skip("transformers before 5.19 reads these elsewhere")
    q = fmt.requant(drawn(48, 96, dtype=dtype))
    want = reader(None).convert({"weight": q.data["qdata"], "weight_scale_inv": q.data["scale"]})["weight"]
    # it has no dtype to go by here, hence casts to bfloat16 where the scale is an exponent
    same(fmt.dequant(q).to(want.dtype), want) if dtype == torch.float32 else same(fmt.dequant(q), want.to(dtype))


# -- elements and scales by definition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FLOAT8)
def test_every_code_of_eight_bits_decodes_as_torch_converts_it(kind):
    element = FLOAT8[kind]
    codes = torch.arange(256, dtype=torch.uint8).repeat(3).view(element.dtype)
    pairs = torch.cartesian_prod(*[torch.arange(256, dtype=torch.uint8)] * 2).view(element.dtype)
    views = {
        "pairs": pairs,
        "odd columns": codes[:255].reshape(5, 51),
        "an odd offset": codes[1:257].reshape(4, 64),
        "transposed": codes.reshape(16, 48).mT,
    }
    for given in views.values():
        got, want = element.values(given), given.to(torch.float32).reshape(-1)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(raw(got.nan_to_num(7.0)), raw(want.nan_to_num(7.0)))
    assert element.values(codes).isnan().any()


def test_codes_of_four_bits_are_nearest_ties_to_even_with_the_sign_of_zero():
    grid = levels(MXFP4())
    middles = (grid[1:] + grid[:-1]).float() / 2
    sizes = torch.cat(
        [grid.float(), middles, middles.nextafter(middles * 0), middles.nextafter(middles * 2), torch.tensor([9e9])]
    )
    values = F.pad(torch.cat([sizes, -sizes]), (0, 4)).reshape(2, -1)
    apart = (values.abs().double().reshape(-1, 1) - grid).abs()
    nearest = apart.amin(1, keepdim=True) == apart
    even = torch.where(nearest & (torch.arange(8) % 2 == 0), 2, nearest.int()).argmax(1)
    want = even + 8 * torch.signbit(values).reshape(-1)
    packed = E2M1.codes(values)
    assert torch.equal(torch.stack([packed & 15, packed >> 4], -1).reshape(-1).long(), want)
    signed = torch.copysign(grid.float()[even], values.reshape(-1))
    assert torch.equal(raw(E2M1.values(packed)), raw(signed))
    assert torch.equal(E2M1.values(torch.tensor([[0x21]], dtype=torch.uint8)), torch.tensor([0.5, 1.0]))


def test_exponents_are_exact_powers_of_two_and_the_last_is_nan():
    codes = torch.arange(256, dtype=torch.uint8)
    got = e8m0_values(codes)
    assert got[:255].tolist() == [2.0 ** (k - 127) for k in range(255)]
    assert got[255].isnan()
    assert torch.equal(torch.func.vmap(e8m0_values)(codes[:200].reshape(4, 50)).reshape(-1), got[:200])
    compiled = torch.compile(e8m0_values, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(codes)[:255], got[:255])


@pytest.mark.parametrize("block", ["row", "tensor", 8, (5, 16), (7, 9), (100, 100)], ids=str)
def test_an_fp8_scale_multiplies_its_tile_ragged_or_not(block):
    w = drawn(12, 40)
    fmt = FP8(block_size=block)
    q = fmt.requant(w)
    r, c = tile_of(block, 12, 40)
    scale = q.data["scale"]
    assert scale.shape == (math.ceil(12 / r), math.ceil(40 / c))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = w[i * r : (i + 1) * r, j * c : (j + 1) * c]
            assert float(scale[i, j]) == float(part.abs().max() / 448)
    spread = scale.repeat_interleave(r, 0)[:12].repeat_interleave(c, 1)[:, :40]
    same(fmt.dequant(q), q.data["qdata"].float() * spread)


# -- laws --------------------------------------------------------------------------------------------------------------------


def scale_of(q):
    """The factor of every entry, in float64."""
    data, shape = q.data, matrix_shape(q.shape)
    if isinstance(q.format, FP8):
        r, c = tile_of(q.format.block_size, *shape)
        return (
            data["scale"].double().repeat_interleave(r, 0)[: shape[0]].repeat_interleave(c, 1)[:, : shape[1]].reshape(q.shape)
        )
    if isinstance(q.format, NVFP4):
        factor = data["scale"].float() * data.get("per_tensor_scale", torch.tensor(1.0))
    else:
        factor = torch.exp2(data["scale"].double() - 127)
    return factor.double().repeat_interleave(q.format.block_size, 1).reshape(q.shape)


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entry_within_the_grid_errs_by_at_most_the_step(fmt, shape, dtype):
    w = drawn(*shape, seed=len(shape), dtype=dtype)
    before = w.clone()
    q = fmt.requant(w)
    assert torch.equal(w, before)
    back, step = fmt.dequant(q), fmt.step(q)
    assert (back.shape, back.dtype, step.shape) == (w.shape, dtype, w.shape)
    assert q.shape == w.shape
    within = w.double().abs() <= levels(fmt)[-1] * scale_of(q)
    assert float(within.double().mean()) > 0.9
    error = (fmt.decode(q).reshape(shape).double() - w.double()).abs()
    slack = 4 * torch.finfo(torch.float32).eps * w.double().abs()
    assert (error <= step.double() + slack)[within].all()
    exact = isinstance(fmt, (FP8, NVFP4))
    assert float(fmt.clipped(w, q)) <= float((~within).double().mean())
    assert float(fmt.clipped(w, q)) == 0 if exact else float(fmt.clipped(w, q)) < 0.02


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_a_step_is_the_largest_error_of_its_code(fmt):
    grid = levels(fmt)
    middles = ((grid[1:] + grid[:-1]) / 2).float()
    near = torch.cat([middles, middles.nextafter(middles * 0), middles.nextafter(middles * 2), grid.float()])
    values = F.pad(torch.cat([near, -near]), (0, -2 * len(near) % 32))[None]
    q = Quantized(unit_grid(fmt, values.shape), fmt, values.shape, values.dtype)
    q = fmt.requant(values, like=q)
    back = fmt.dequant(q)
    error, step = (values - back).abs(), fmt.step(q)
    worst = {float(v): float(error[back.abs() == v].max()) for v in grid}
    assert {float(v): float(step[back.abs() == v].max()) for v in grid} == pytest.approx(worst, rel=1e-5)


def unit_grid(fmt, shape):
    rows, columns = shape
    if isinstance(fmt, FP8):
        r, c = tile_of(fmt.block_size, rows, columns)
        return {"qdata": torch.zeros(shape), "scale": torch.ones(math.ceil(rows / r), math.ceil(columns / c))}
    if isinstance(fmt, NVFP4):
        scale = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
        return {"qdata": torch.zeros(shape), "scale": scale} | ({"per_tensor_scale": torch.ones(())} if fmt.per_tensor else {})
    return {"qdata": torch.zeros(shape), "scale": torch.full((rows, columns // 32), 127, dtype=torch.uint8)}


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-38, 3e37], ids=str)
def test_storing_again_keeps_every_bit_for_twenty_rounds(fmt, size):
    w = drawn(16, 96, size=size)
    w[3] = 0
    first = q = fmt.requant(w)
    assert fmt.dequant(q).isfinite().all()
    assert not fmt.dequant(q)[3].any() or (fmt == FP8(block_size=(5, 48)))
    for _ in range(20):
        q = fmt.requant(fmt.dequant(q), like=q)
        same_stored(q, first)
    assert all(q.data[n] is first.data[n] for n in q.data if n != "qdata")
    again = fmt.requant(fmt.dequant(first))
    if fmt.refits_exactly:
        same_stored(again, first)
    else:
        same(again.data["qdata"], first.data["qdata"])
        same(again.data["scale"], first.data["scale"])


def test_the_scale_of_a_whole_weight_may_refit_to_another_last_bit():
    assert not NVFP4().refits_exactly
    moved = []
    for seed in range(40):
        q = NVFP4().requant(drawn(4, 32, seed=seed))
        again = NVFP4().requant(NVFP4().dequant(q)).data["per_tensor_scale"]
        moved.append(float(again / q.data["per_tensor_scale"] - 1))
    assert 0 < max(map(abs, moved)) <= 2**-22


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_codes_stay_too(fmt, dtype):
    q = fmt.requant(drawn(16, 96, dtype=dtype))
    again = fmt.requant(fmt.dequant(q), like=q)
    same_stored(again, q)
    assert again.dtype == dtype


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_zeros_and_the_extremes_of_float32(fmt):
    q = fmt.requant(torch.zeros(4, 96))
    assert not fmt.dequant(q).any()
    assert torch.isfinite(fmt.step(q)).all()
    largest = torch.finfo(torch.float32).max
    w = drawn(4, 96)
    w[0, 0], w[1, 0], w[2] = largest, -largest, 1e-44
    q = fmt.requant(w)
    back = fmt.dequant(q)
    assert back.isfinite().all()
    if fmt == FP8():
        torch.testing.assert_close(back[:2, 0], w[:2, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", [f for f in FP8S if f.kind == "e4m3"], ids=repr)
@pytest.mark.parametrize("size", [1e-37, 1e-42, 1e-44], ids=str)
def test_an_fp8_scale_stays_a_normal_number(fmt, size):
    w = drawn(4, 96, size=size)
    q = fmt.requant(w)
    assert float(q.data["scale"].min()) == torch.finfo(torch.float32).tiny
    assert float(fmt.clipped(w, q)) == 0


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_a_scale_of_zero_decodes_to_zeros_and_stores_zeros(fmt):
    if isinstance(fmt, Microscaling):  # its smallest scale is 2^-127
        data = unit_grid(fmt, (2, 96))
        like = Quantized({**data, "scale": data["scale"] * 0}, fmt, torch.Size((2, 96)), torch.float32)
        w = torch.full((2, 96), 2.0**-127) * torch.tensor([[1.0], [-1.0]])
        assert torch.equal(fmt.dequant(fmt.requant(w, like=like)), w)
        return
    like = fmt.requant(drawn(2, 96))
    like = Quantized({**like.data, "scale": torch.zeros_like(like.data["scale"])}, fmt, like.shape, like.dtype)
    q = fmt.requant(-torch.ones(2, 96), like=like)
    assert torch.equal(raw(fmt.dequant(q)), raw(-torch.zeros(2, 96)))
    assert torch.equal(quotient(torch.ones(2), torch.tensor([0.0, 4.0])), torch.tensor([0, 0.25]))


def test_what_saturates_is_counted_as_clipped():
    w = torch.zeros(2, 32)
    w[0, :4] = torch.tensor([7.5, 6.5, -7.5, 5.0])  # a power of two below 4: levels up to 6, a step of 1
    w[1, :2] = torch.tensor([6.0, 3.0])
    q = MXFP4().requant(w)
    assert MXFP4().dequant(q)[0, :4].tolist() == [6, 6, -6, 4]
    assert float(MXFP4().clipped(w, q)) == 2 / 64
    q = MXFP8().requant(w * 64)  # 480 saturates at 448, with a step of 16; 416 is a level
    assert MXFP8().dequant(q)[0, :4].tolist() == [448, 416, -448, 320]
    assert float(MXFP8().clipped(w * 64, q)) == 2 / 64
    like = FP8(block_size="tensor").requant(w)
    assert float(FP8(block_size="tensor").clipped(w * 2, FP8(block_size="tensor").requant(w * 2, like=like))) == 5 / 64
    like = NVFP4().requant(w)
    assert float(NVFP4().clipped(w * 2, NVFP4().requant(w * 2, like=like))) == 5 / 64


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_decoding_maps_over_stacked_codes_and_compiles(fmt):
    ws = drawn(3, 10, 96)
    each = [fmt.requant(w) for w in ws]
    stacked = tree_map(lambda *t: torch.stack(t), *each)
    want = torch.stack([fmt.dequant(q) for q in each])
    same(torch.func.vmap(fmt.dequant)(stacked), want)
    same(torch.func.vmap(fmt.step)(stacked), torch.stack([fmt.step(q) for q in each]))
    last = tree_map(lambda t: torch.stack(t.unbind(), -1), stacked)
    same(torch.func.vmap(fmt.dequant, in_dims=-1)(last), want)
    torch._dynamo.reset()
    same(torch.compile(fmt.dequant, fullgraph=True, backend="aot_eager")(each[0]), want[0])
    if fmt in (FP8(), NVFP4()):
        mapped = torch.compile(torch.func.vmap(fmt.dequant), fullgraph=True, backend="aot_eager")
        same(mapped(stacked), want)


@pytest.mark.parametrize("fmt", [FP8(), FP8(block_size=(5, 48)), NVFP4()], ids=repr)
def test_a_scale_has_a_gradient(fmt):
    w, x = drawn(8, 96), drawn(8, 96, seed=1)
    q = fmt.requant(w)
    name = "per_tensor_scale" if isinstance(fmt, NVFP4) else "scale"

    def loss(scale):
        return (fmt.dequant(Quantized({**q.data, name: scale}, fmt, q.shape, q.dtype)) * x).sum()

    scale = q.data[name]
    got = torch.func.grad(loss)(scale)
    total = (fmt.dequant(q).double() * x.double()).sum()
    assert float((got.double() * scale.double()).sum()) == pytest.approx(float(total), rel=1e-4)  # linear in the scales
    tangent = torch.func.jvp(loss, (scale,), (scale,))[1]
    assert float(tangent) == pytest.approx(float(total), rel=1e-4)


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_experts_are_stored_as_the_rows_of_one_matrix(fmt):
    w = drawn(3, 5, 96)
    q = fmt.requant(w)
    flat = fmt.requant(w.reshape(15, 96))
    same_stored(q, flat)
    same(fmt.dequant(q), fmt.dequant(flat).reshape(3, 5, 96))
    kernel = fmt.requant(w.reshape(3, 5, 32, 3))
    same(fmt.dequant(kernel).reshape(3, -1), fmt.dequant(fmt.requant(w.reshape(3, 480))))


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_the_default_dtype_of_torch_does_not_matter(fmt):
    w = drawn(4, 96)
    want, back, step = (q := fmt.requant(w)), fmt.dequant(q), fmt.step(q)
    torch.set_default_dtype(torch.float64)
    try:
        same_stored(fmt.requant(w), want)
        same(fmt.dequant(want), back)
        same(fmt.step(want), step)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_bytes_stored_are_those_of_the_layout():
    w = drawn(32, 64)
    sizes = {
        FP8(): 2048 + 128,
        FP8(block_size="tensor"): 2048 + 4,
        NVFP4(): 1024 + 128 + 4,
        MXFP4(): 1024 + 64,
        MXFP8(): 2048 + 64,
    }
    assert {fmt: fmt.requant(w).nbytes for fmt in sizes} == sizes
    e4m3, e5m2, byte = torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8
    dtypes = {FP8(kind="e5m2"): [e5m2, torch.float32], NVFP4(): [byte, e4m3, torch.float32], MXFP4(): [byte, byte]}
    dtypes |= {MXFP8(): [e4m3, byte], MXFP8(kind="e5m2"): [e5m2, byte], FP8(): [e4m3, torch.float32]}
    assert {fmt: [t.dtype for t in fmt.requant(w).data.values()] for fmt in dtypes} == dtypes


@pytest.mark.parametrize("fmt", [e for f in (FP8, NVFP4, MXFP4, MXFP8) for e in f.examples()], ids=repr)
def test_a_format_is_data_and_its_examples_fit_small_shapes(fmt):
    assert type(fmt).from_dict(fmt.to_dict()) == fmt
    assert fmt.fits((8, 64))


# -- refusals ----------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    rows = [
        (MXFP4(), (4, 33), r"mxfp4: in_features must be a multiple of block_size 32, got \(4, 33\); leave the weight dense"),
        (MXFP8(), (4, 16), r"mxfp8: in_features must be a multiple of block_size 32, got \(4, 16\)"),
        (NVFP4(), (4, 24), r"nvfp4: in_features must be a multiple of block_size 16, got \(4, 24\)"),
        (FP8(block_size=8), (4, 12), r"fp8: in_features must be a multiple of block_size 8, got \(4, 12\)"),
        (FP8(), (0, 12), r"fp8: a weight with entries is required, got \(0, 12\)"),
        (NVFP4(), (3, 0), r"nvfp4: a weight with entries is required, got \(3, 0\)"),
    ]
    for fmt, shape, text in rows:
        assert not fmt.fits(shape)
        with pytest.raises(ValueError, match=text):
            fmt.requant(torch.ones(shape))
    assert FP8(block_size=(8, 8)).fits((5, 13))
    assert FP8().fits((7,))


def test_fields_are_checked():
    rows = [
        (
            lambda: FP8(block_size="column"),
            "fp8: block_size must be 'tensor', 'row', a positive int or a pair of them, got 'column'",
        ),
        (lambda: FP8(block_size=0), "fp8: block_size must be .* got 0"),
        (lambda: FP8(kind="e3m4"), "fp8: kind must be 'e4m3' or 'e5m2', got 'e3m4'"),
        (lambda: MXFP8(kind="e2m1"), "mxfp8: kind must be 'e4m3' or 'e5m2', got 'e2m1'"),
        (lambda: NVFP4(per_tensor=1), "nvfp4: per_tensor must be True or False, got 1"),  # type: ignore[arg-type]
    ]
    for call, text in rows:
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match=r"microscaling: a format must define element\."):
        _ = Microscaling().element
