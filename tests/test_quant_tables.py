"""Formats whose codes name entries of a table, against the libraries that define them: bitsandbytes, transformers, aqlm."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from funcpeft.errors import CannotRequantizeError
from funcpeft.quant import FP4, NF4, Codebook, Dense, Int8, Ternary
from funcpeft.quant.lookup import NESTED, dynamic_levels
from funcpeft.storage import Quantized
from funcpeft.tree import tree_map

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the libraries warn about what they would like to be installed too
    import aqlm.utils
    import bitsandbytes.functional as bnb
    from transformers.integrations import bitnet

BNB: Any = bnb  # neither library's annotations are those of its functions
AQLM: Any = aqlm.utils
LOOKUPS = {"nf4": NF4, "fp4": FP4}
SHAPES = [(256, 512), (64, 64), (96, 80), (7, 11), (5, 7), (64, 65)]
BLOCKS = [32, 64, 128, 256, 512]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

over_lookups = pytest.mark.parametrize("name", LOOKUPS)
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def drawn(*shape, seed=0, dtype=torch.float32):
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def stored_by_bnb(w, name, block, nested):
    """Returns the library's packed codes and state, and its leaves as ours."""
    packed, state = BNB.quantize_4bit(w, blocksize=block, quant_type=name, compress_statistics=nested)
    data = {"qdata": packed.flatten(), "scale": state.absmax}
    if nested:
        data |= {"nested_scale": state.state2.absmax, "offset": state.offset}
    return packed, state, Quantized(data, LOOKUPS[name](block_size=block, double_quant=nested), w.shape, w.dtype)


def decoded_by_hand(state, packed, count, block):
    """Returns what the flat codes mean, in float32 and numpy: the definition, whatever kernel a machine has."""
    scales = state.absmax.numpy()
    if state.nested:
        assert state.state2.blocksize == NESTED
        largest = state.state2.absmax.numpy().repeat(NESTED)[: len(scales)]
        scales = state.state2.code.numpy()[scales] * largest + state.offset.numpy()
    codes = np.stack((packed.numpy() >> 4, packed.numpy() & 15), axis=-1).reshape(-1)[:count]
    return torch.from_numpy(state.code.numpy()[codes] * scales.repeat(block)[:count])


# -- NF4 and FP4 ---------------------------------------------------------------------------------------------------------------


@over_lookups
@over_shapes
@over_dtypes
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_what_bitsandbytes_stored_decodes_to_its_bits(name, shape, dtype, nested):
    w = drawn(*shape, seed=1, dtype=dtype)
    for block in BLOCKS:
        packed, state, q = stored_by_bnb(w, name, block, nested)
        got = q.format.dequant(q)
        assert (got.shape, got.dtype) == (w.shape, dtype)
        assert torch.equal(got, decoded_by_hand(state, packed, w.numel(), block).reshape(shape).to(dtype)), block
        if shape[1] % block == 0:  # elsewhere the library's kernel for AVX512 blocks rows instead of the flat weight
            assert torch.equal(got, BNB.dequantize_4bit(packed, state)), block


@over_shapes
@over_dtypes
def test_nf4_codes_are_those_of_bitsandbytes(shape, dtype):
    w = drawn(*shape, seed=2, dtype=dtype)
    for block in BLOCKS:
        _, _, theirs = stored_by_bnb(w, "nf4", block, False)
        ours = theirs.format.requant(w)
        assert torch.equal(ours.data["scale"], theirs.data["scale"])
        assert torch.equal(ours.data["qdata"], theirs.data["qdata"])
        assert torch.equal(theirs.format.requant(w, like=theirs).data["qdata"], theirs.data["qdata"])


@over_shapes
@over_dtypes
def test_fp4_codes_are_those_of_bitsandbytes_but_for_ties(shape, dtype):
    w = drawn(*shape, seed=3, dtype=dtype)
    for block in BLOCKS:
        _, _, theirs = stored_by_bnb(w, "fp4", block, False)
        ours = theirs.format.requant(w)
        assert torch.equal(ours.data["scale"], theirs.data["scale"])
        scale = ours.data["scale"].repeat_interleave(block)[: w.numel()].reshape(shape).double()
        a, b = (q.format.decode(q).reshape(shape).double() for q in (ours, theirs))
        apart = ((a - w.double()).abs() - (b - w.double()).abs()).abs() / scale
        assert float(apart.max()) < 1e-6  # both levels equally near, as far as float32 can tell
        if dtype == torch.float32:
            assert torch.equal(a, b)
        assert int((a != b).sum()) <= 1 + w.numel() // 500


@over_lookups
@over_shapes
def test_nested_scales_are_nearest_and_codes_are_nearest_to_them(name, shape):
    w = drawn(*shape, seed=4)
    for block in BLOCKS:
        _, _, theirs = stored_by_bnb(w, name, block, True)
        fmt = theirs.format
        ours, kept = fmt.requant(w), fmt.requant(w, like=theirs)
        assert torch.equal(ours.data["nested_scale"], theirs.data["nested_scale"])
        assert torch.equal(ours.data["offset"], theirs.data["offset"])
        exact = LOOKUPS[name](block_size=block).requant(w).data["scale"].double()
        ulp = 4 * torch.finfo(torch.float32).eps * exact
        apart = [(fmt.scales(q).double() - exact).abs() for q in (ours, theirs)]
        assert (apart[0] <= apart[1] + ulp).all(), block
        error = [(fmt.dequant(q).double() - w.double()).abs() for q in (kept, theirs)]
        assert (error[0] <= error[1] + torch.finfo(torch.float32).eps * w.double().abs()).all(), block
        mine = float((fmt.dequant(ours).double() - w.double()).square().sum())
        assert mine <= 1.0001 * float(error[1].square().sum()), block


def test_the_dynamic_levels_are_those_of_bitsandbytes():
    assert torch.equal(dynamic_levels(), BNB.create_dynamic_map())


@over_lookups
def test_the_levels_are_those_of_bitsandbytes(name):
    assert torch.equal(torch.tensor(LOOKUPS[name].levels), BNB.get_4bit_type(name, device="cpu"))


@over_shapes
def test_nf4_refits_to_the_same_bits(shape):
    w = drawn(*shape, seed=5)
    for block in BLOCKS:
        fmt = NF4(block_size=block)
        q = fmt.requant(w)
        again = fmt.requant(fmt.dequant(q))
        assert all(torch.equal(again.data[n], t) for n, t in q.data.items()), block


@pytest.mark.parametrize("fmt", [*NF4.examples(), *FP4.examples(), Int8(), *Ternary.examples(), *Dense.examples()], ids=repr)
@over_dtypes
def test_a_kept_grid_keeps_its_codes_for_twenty_rounds(fmt, dtype):
    first = q = fmt.requant(drawn(16, 96, seed=6, dtype=dtype))
    for _ in range(20):
        q = fmt.requant(fmt.decode(q).reshape(q.shape), like=q)
    assert q.dtype == dtype
    for name, t in first.data.items():
        assert torch.equal(q.data[name].float(), t.float()), name
        assert name == "qdata" or q.data[name] is t


@over_lookups
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_blocks_of_zeros_decode_to_zeros(name, nested):
    fmt = LOOKUPS[name](block_size=32, double_quant=nested)
    assert not fmt.dequant(fmt.requant(torch.zeros(8, 64))).any()
    w = drawn(8, 64, seed=7)
    w[3] = 0
    back = fmt.dequant(fmt.requant(w))
    assert torch.isfinite(back).all()
    assert not back[3].any()
    _, state, theirs = stored_by_bnb(w, name, 32, nested)
    assert not fmt.dequant(theirs)[3].any()
    assert state.absmax.numel() == theirs.data["scale"].numel() == 16


@over_lookups
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_nothing_about_a_table_is_special_under_vmap_and_compile(name, nested):
    fmt = LOOKUPS[name](block_size=32, double_quant=nested)
    each = [fmt.requant(drawn(5, 40, seed=s)) for s in range(3)]
    stacked = tree_map(lambda *t: torch.stack(t), *each)
    want = torch.stack([fmt.dequant(q) for q in each])
    assert torch.equal(torch.func.vmap(fmt.dequant)(stacked), want)
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.vmap(fmt.dequant), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(stacked), want)


# -- Int8 ----------------------------------------------------------------------------------------------------------------------


@over_shapes
@over_dtypes
def test_int8_is_that_of_bitsandbytes_but_for_ties(shape, dtype):
    w = drawn(*shape, seed=8, dtype=dtype)
    codes, scales, _ = BNB.int8_vectorwise_quant(w)
    theirs = Quantized({"qdata": codes, "scale": scales}, Int8(), w.shape, torch.float32)
    assert torch.equal(Int8().dequant(theirs), BNB.int8_vectorwise_dequant(codes, scales))
    ours = Int8().requant(w)
    assert torch.equal(ours.data["scale"], scales)
    differ = ours.data["qdata"] != codes
    exact = w.double() * 127 / scales.double()[:, None]
    assert ((exact - exact.floor() - 0.5).abs()[differ] < 1e-5).all()
    assert int(differ.sum()) <= 1 + w.numel() // 1000
    assert torch.equal(Int8().requant(w, like=theirs).data["qdata"], ours.data["qdata"])


def test_int8_rows_of_zeros_decode_to_zeros():
    w = drawn(4, 16, seed=9)
    w[2] = 0
    q = Int8().requant(w)
    assert not Int8().dequant(q)[2].any()
    assert torch.isfinite(Int8().dequant(q)).all()
    codes, scales, _ = BNB.int8_vectorwise_quant(w)
    assert torch.equal(q.data["scale"], scales)
    assert torch.equal(q.data["qdata"][[0, 1, 3]], codes[[0, 1, 3]])


# -- Dense ---------------------------------------------------------------------------------------------------------------------


@over_dtypes
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
def test_dense_is_a_cast(storage, dtype):
    w = drawn(5, 7, seed=10, dtype=dtype)
    fmt, kept = Dense(storage=storage), getattr(torch, storage)
    q = fmt.requant(w)
    assert q.data["qdata"].dtype == kept
    assert torch.equal(fmt.dequant(q), w.to(kept).to(dtype))
    assert ((fmt.decode(q).double() - w.double()).abs() <= fmt.step(q).double()).all()
    assert q.data["qdata"].untyped_storage().data_ptr() != w.untyped_storage().data_ptr()
    assert torch.equal(fmt.requant(2 * w, like=q).data["qdata"], (2 * w).to(kept))


def test_dense_names_its_dtypes():
    with pytest.raises(ValueError, match=r"dense: storage must be one of \('float32', 'bfloat16', 'float16'\), got 'float8'"):
        Dense(storage="float8")


# -- Ternary -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def eager():
    """Lets transformers' functions run as written: they are decorated with ``torch.compile``."""
    with torch.compiler.set_stance("force_eager"):
        yield


def ternary_codes(rows, columns, seed=0):
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.usefixtures("eager")
@over_dtypes
@pytest.mark.parametrize("shape", [(256, 512), (4, 7), (96, 80), (64, 65)], ids=str)
def test_ternary_decodes_what_transformers_packs(shape, dtype):
    codes = ternary_codes(*shape)
    packed = bitnet.pack_weights(codes.clone())
    for number in (torch.tensor([1.2193]).to(dtype), torch.tensor(37.25).to(dtype), torch.tensor([0.03]).to(dtype)):
        divided = Quantized({"qdata": packed, "inverse_scale": number}, Ternary(), codes.shape, dtype)
        assert torch.equal(Ternary().dequant(divided), bitnet.unpack_weights(packed, dtype) / number)
        times = Quantized({"qdata": packed, "scale": number}, Ternary(inverse=False), codes.shape, dtype)
        assert torch.equal(times.format.dequant(times), bitnet.unpack_weights(packed, dtype) * number)


@pytest.mark.usefixtures("eager")
def test_the_layers_of_transformers_divide_and_multiply():
    codes, x = ternary_codes(8, 16), torch.randn(3, 16)
    x = (x / x.abs().amax(1, keepdim=True) * 127).round() / 127  # on the grid to which the layers round their input
    number = torch.tensor([2.5])
    divides: Any = bitnet.BitLinear(16, 8, bias=False, dtype=torch.float32)
    divides.weight, divides.weight_scale = bitnet.pack_weights(codes.clone()), number
    multiplies: Any = bitnet.AutoBitLinear(16, 8, bias=False)
    multiplies.weight.data, multiplies.weight_scale = codes, number
    for layer, inverse in ((divides, True), (multiplies, False)):
        fmt = Ternary(inverse=inverse)
        name = "inverse_scale" if inverse else "scale"
        q = Quantized({"qdata": divides.weight, name: number}, fmt, torch.Size((8, 16)), torch.float32)
        torch.testing.assert_close(x @ fmt.dequant(q).T, layer(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 9, 64])
@pytest.mark.parametrize("fmt", Ternary.examples(), ids=repr)
def test_ternary_fits_and_packs_as_transformers_does(fmt, rows):
    w = drawn(rows, 33, seed=rows)
    q = fmt.requant(w)
    inverse = 1 / w.abs().mean()
    codes = (w * inverse).round().clamp(-1, 1)
    assert torch.equal(q.data["qdata"], bitnet.pack_weights(codes.clone()))
    assert q.data["qdata"].shape == (-(-rows // 4), 33)
    assert {t.shape for n, t in q.data.items() if n != "qdata"} == {()}
    want = codes / inverse
    if fmt.inverse:
        assert torch.equal(fmt.dequant(q), want)
        assert torch.equal(fmt.dequant(q), bitnet.WeightQuant.apply(w))
    torch.testing.assert_close(fmt.dequant(q), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", Ternary.examples(), ids=repr)
@pytest.mark.parametrize("shape", [(7, 9), (2, 3, 10), (6, 2, 3, 3)], ids=str)
def test_ternary_errs_by_its_step_or_is_clipped(fmt, shape):
    w = drawn(*shape, seed=11)
    q = fmt.requant(w)
    step, error = fmt.step(q), (fmt.dequant(q) - w).abs()
    assert step.shape == w.shape
    beyond = w.abs() > 3 * step
    assert beyond.any()
    assert (error[~beyond] <= step[~beyond] * (1 + 1e-6)).all()
    assert (error[beyond] > step[beyond] * (1 - 1e-6)).all()
    assert float(fmt.clipped(w, q)) == pytest.approx(float(beyond.double().mean()))
    refit = fmt.requant(fmt.dequant(q))
    assert torch.equal(refit.data["qdata"], q.data["qdata"])
    assert not torch.equal(fmt.dequant(refit), fmt.dequant(q))
    scale, zero = fmt.grid(q)
    codes = fmt.decode(q) / scale + zero
    assert scale.shape == zero.shape == (fmt.decode(q).shape[0], 1)
    assert set(codes.round().unique().tolist()) == {0.0, 1.0, 2.0}
    torch.testing.assert_close((codes.round() - zero) * scale, fmt.decode(q))


@pytest.mark.parametrize("fmt", Ternary.examples(), ids=repr)
def test_ternary_of_zeros_of_nothing_and_of_a_vector(fmt):
    q = fmt.requant(torch.zeros(8, 5))
    assert not fmt.dequant(q).any()
    assert torch.isfinite(fmt.step(q)).all()
    assert fmt.dequant(fmt.requant(torch.zeros(4, 0))).shape == (4, 0)
    assert fmt.dequant(fmt.requant(torch.zeros(0, 4))).shape == (0, 4)
    with pytest.raises(ValueError, match=r"ternary: a weight with rows is required, got \(4,\); leave the weight dense"):
        fmt.requant(torch.ones(4))
    with pytest.raises(ValueError, match="ternary: inverse must be True or False, got 1"):
        Ternary.from_dict({"inverse": 1})


# -- Codebook ------------------------------------------------------------------------------------------------------------------


def additive(fmt, rows, columns, dtype=torch.float32, seed=0):
    """Returns drawn leaves, packed by the library, and the library's own decoded weight."""
    gen = torch.Generator().manual_seed(seed)
    bits, groups = fmt.nbits_per_codebook, (rows // fmt.out_group_size, columns // fmt.in_group_size)
    codes = torch.randint(0, 2**bits, (*groups, fmt.num_codebooks), generator=gen)
    vectors = (fmt.num_codebooks, 2**bits, fmt.out_group_size, fmt.in_group_size)
    codebooks = torch.randn(vectors, generator=gen).to(dtype)
    scale = torch.rand((groups[0], 1, 1, 1), generator=gen).to(dtype)
    packed = AQLM.pack_int_data(codes.clone(), bits).clone()  # made in inference mode
    want = AQLM._dequantize_weight(AQLM.unpack_int_data(packed, bits), codebooks, scale)
    data = {"qdata": packed, "codebooks": codebooks, "scale": scale}
    return Quantized(data, fmt, torch.Size((rows, columns)), dtype), want


BOOKS = [
    Codebook(),
    Codebook(nbits_per_codebook=8),
    Codebook(num_codebooks=2, nbits_per_codebook=8),
    Codebook(num_codebooks=8, nbits_per_codebook=4),
    Codebook(num_codebooks=2, nbits_per_codebook=12, in_group_size=16),
    *Codebook.examples(),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the library scripts its function
@pytest.mark.parametrize("fmt", BOOKS, ids=repr)
@over_dtypes
@pytest.mark.parametrize("shape", [(64, 128), (2, 16)], ids=str)
def test_codebooks_decode_to_the_bits_of_aqlm(fmt, dtype, shape):
    q, want = additive(fmt, *shape, dtype=dtype)
    got = fmt.dequant(q)
    assert (got.shape, got.dtype) == (want.shape, dtype)
    if dtype != torch.bfloat16 or fmt.num_codebooks == 1:
        assert torch.equal(got, want)
        return
    # torch's kernel for sums of bfloat16 may round halves away from zero; everything else must be the same
    unit = Quantized({**q.data, "scale": torch.ones_like(q.data["scale"])}, fmt, q.shape, dtype)
    exact = Quantized({**unit.data, "codebooks": q.data["codebooks"].float()}, fmt, q.shape, torch.float32)
    bits = fmt.dequant(exact).view(torch.int32)
    differ = got != want
    assert ((bits & 0xFFFF) == 0x8000)[differ].all()
    assert float(differ.double().mean()) < 0.25
    away = ((bits + 0x8000) & -0x10000).view(torch.float32)
    scale = q.data["scale"].float().expand(-1, 1, fmt.out_group_size, 1).reshape(-1, 1)
    assert torch.equal(want[differ], (away * scale).to(dtype)[differ])


@pytest.mark.parametrize("fmt", Codebook.examples(), ids=repr)
def test_codebooks_are_sums_of_vectors(fmt):
    q = fmt.sample(drawn(4, 16, seed=12))
    got, books, codes = fmt.dequant(q), q.data["codebooks"].double(), q.data["qdata"].tolist()
    for row, column in ((0, 0), (1, 9), (3, 15), (2, 6)):
        o, g = row // fmt.out_group_size, column // fmt.in_group_size
        place = row % fmt.out_group_size, column % fmt.in_group_size
        entries = [books[c, codes[o][g][c] % 2**fmt.nbits_per_codebook][place] for c in range(fmt.num_codebooks)]
        assert float(got[row, column]) == pytest.approx(float(sum(entries) * q.data["scale"][o].double()), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("fmt", Codebook.examples(), ids=repr)
def test_a_sample_has_the_layout_and_not_the_values(fmt):
    w = drawn(2, 4, 16, seed=13, dtype=torch.bfloat16)
    q = fmt.sample(w)
    assert (q.shape, q.dtype, q.format) == (w.shape, w.dtype, fmt)
    want = {
        "qdata": (8 // fmt.out_group_size, 16 // fmt.in_group_size, fmt.num_codebooks),
        "codebooks": (fmt.num_codebooks, 2**fmt.nbits_per_codebook, fmt.out_group_size, fmt.in_group_size),
        "scale": (8 // fmt.out_group_size, 1, 1, 1),
    }
    assert {n: tuple(t.shape) for n, t in q.data.items()} == want
    assert q.data["qdata"].dtype == AQLM.get_int_dtype(fmt.nbits_per_codebook)
    assert int(q.data["qdata"].min()) < 0 < int(q.data["qdata"].max())
    assert all(torch.equal(t, fmt.sample(w).data[n]) for n, t in q.data.items())
    assert fmt.dequant(q).shape == w.shape
    assert 0.1 < float(fmt.dequant(q).float().std() / w.float().std()) < 10


def test_codebooks_cannot_be_made_and_have_no_step():
    fmt, w = Codebook(), drawn(4, 16)
    with pytest.raises(
        CannotRequantizeError,
        match="codebook: cannot be made from a weight: additive codebooks are found by beam search on calibration data; keep",
    ):
        fmt.requant(w)
    q = fmt.sample(w)
    with pytest.raises(CannotRequantizeError, match="codebook: cannot be made from a weight"):
        fmt.requant(w, like=q)
    for call in (lambda: fmt.step(q), lambda: fmt.clipped(w, q)):
        with pytest.raises(
            CannotRequantizeError,
            match=r"codebook: a cell of an additive codebook has no half-width; merge to a dense weight\.",
        ):
            call()


def test_fields_and_shapes_of_codebooks_are_checked():
    for field in ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size"):
        for value in (0, -1, 2.0, True):
            fields: dict[str, Any] = {field: value}
            with pytest.raises(ValueError, match=f"codebook: {field} must be a positive int, got {value}"):
                Codebook(**fields)
    with pytest.raises(ValueError, match="codebook: nbits_per_codebook must be at most 16, got 17"):
        Codebook(nbits_per_codebook=17)
    fmt = Codebook(in_group_size=4, out_group_size=2)
    assert fmt.misfit(torch.Size((4, 10))) == "in_features must be a multiple of in_group_size 4"
    assert fmt.misfit(torch.Size((3, 8))) == "rows must be a multiple of out_group_size 2"
    assert fmt.misfit(torch.Size((8,))) == "a weight with rows is required"
    assert fmt.fits((4, 8))
    assert fmt.fits((3, 2, 8))
    assert Codebook.from_dict(fmt.to_dict()) == fmt


# -- both under transforms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [*Ternary.examples(), *Codebook.examples()], ids=repr)
def test_decoding_maps_compiles_and_differentiates(fmt):
    each = [fmt.sample(drawn(6, 16, seed=s)) for s in range(3)]
    stacked = tree_map(lambda *t: torch.stack(t), *each)
    want = torch.stack([fmt.dequant(q) for q in each])
    assert torch.equal(torch.func.vmap(fmt.dequant)(stacked), want)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(fmt.dequant, fullgraph=True, backend="aot_eager")(each[0]), want[0])
    torch._dynamo.reset()
    assert torch.equal(torch.compile(torch.func.vmap(fmt.dequant), fullgraph=True, backend="aot_eager")(stacked), want)
    for name, leaf in each[0].data.items():
        if leaf.is_floating_point():
            _check_gradient(fmt, each[0], name)


def _check_gradient(fmt, q, name):
    cotangent = drawn(*q.shape, seed=14).double()

    def loss(leaf):
        return (fmt.decode(Quantized({**q.data, name: leaf}, fmt, q.shape, q.dtype)).reshape(q.shape) * cotangent).sum()

    leaf = q.data[name]
    got = torch.func.grad(loss)(leaf)
    direction = drawn(*leaf.shape, seed=15) / 0.02 * leaf.abs().mean()
    tangent = torch.func.jvp(loss, (leaf,), (direction,))[1]
    assert got.any()
    torch.testing.assert_close(tangent, (got * direction).sum().to(tangent.dtype), rtol=1e-3, atol=1e-7)
    h = 1e-2
    numeric = (loss(leaf + h * direction) - loss(leaf - h * direction)) / (2 * h)
    torch.testing.assert_close(tangent.double(), numeric.double(), rtol=1e-2, atol=1e-6)
