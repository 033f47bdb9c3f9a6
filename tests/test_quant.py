"""Formats: equal to bitsandbytes where that is right, errors within the step, nets on quantized bases."""

import dataclasses

import pytest
import torch
from torch import nn

from funcpeft.adapt import adapt
from funcpeft.errors import NoMatchError
from funcpeft.functional import functionalize
from funcpeft.methods import IA3, OFT, DoRA, LoHa, LoRA
from funcpeft.quant import NF4, Int8
from funcpeft.quant.format import Format
from funcpeft.quant.nf4 import LEVELS
from funcpeft.quantization import dequantize, quantize
from funcpeft.tree import tree_map
from funcpeft.weights import Quantized

FORMATS = [NF4(), NF4(block_size=32), NF4(block_size=256), Int8()]


class Mlp(nn.Module):
    def __init__(self, wide=24):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(12, wide), nn.LayerNorm(wide), nn.Linear(wide, 6, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def functional(dtype=torch.float32):
    torch.manual_seed(4)
    return functionalize(Mlp().to(dtype))


def moved(adapter, seed=7):
    gen = torch.Generator().manual_seed(seed)

    def move(t):
        return t + (0.3 * torch.randn(t.shape, generator=gen)).to(t.dtype)

    return adapter.replace(params=tree_map(move, adapter.params))


# -- against bitsandbytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("shape", [(64, 64), (3, 128), (128, 192), (5, 30)], ids=str)
def test_nf4_codes_and_scales_are_those_of_bitsandbytes(shape, block):
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = drawn(*shape, seed=sum(shape))
    codes, state = bnb.quantize_4bit(w, blocksize=block, quant_type="nf4", compress_statistics=False)
    ours = NF4(block_size=block).requant(w)
    assert torch.equal(ours.data["qdata"], codes.flatten())
    assert torch.equal(ours.data["scale"], state.absmax)
    if shape[1] % block == 0:  # bitsandbytes' CPU kernel decodes other shapes wrongly
        assert torch.equal(NF4(block_size=block).dequant(ours), bnb.dequantize_4bit(codes, state))


def test_the_levels_are_those_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(torch.tensor(LEVELS), bnb.get_4bit_type("nf4", device="cpu"))


def test_int8_codes_and_scales_are_those_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = drawn(16, 64, dtype=torch.float16)
    codes, scales, _ = bnb.int8_vectorwise_quant(w)
    ours = Int8().requant(w)
    torch.testing.assert_close(ours.data["scale"], scales, rtol=1e-6, atol=0)
    assert int((ours.data["qdata"].int() - codes.int()).abs().max()) <= 1
    assert float((ours.data["qdata"] != codes).double().mean()) < 0.01


# -- one format --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("shape", [(8, 32), (5, 7), (1, 1), (3, 130), (4, 3, 2, 2), (2, 8, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_error_is_at_most_the_step_and_encoding_again_changes_nothing(fmt, shape, dtype):
    w = drawn(*shape, seed=len(shape), dtype=dtype)
    before = w.clone()
    q = fmt.requant(w)
    back, step = fmt.dequant(q), fmt.step(q)
    assert torch.equal(w, before)
    assert (back.shape, back.dtype) == (w.shape, dtype)
    assert step.shape == w.shape
    ulp = torch.finfo(dtype).eps * w.double().abs().max() + torch.finfo(torch.float32).eps * w.double().abs()
    assert ((back.double() - w.double()).abs() <= step.double() + ulp).all()
    again = fmt.requant(back.float() if dtype == torch.bfloat16 else back)
    if dtype != torch.bfloat16:  # rounding the decoded weight moves its maximum, hence the scales
        assert torch.equal(again.data["qdata"], q.data["qdata"])
        torch.testing.assert_close(again.data["scale"], q.data["scale"], rtol=1e-6, atol=0)
    assert {t.device.type for t in q.data.values()} == {"cpu"}
    assert q.nbytes == sum(t.numel() * t.element_size() for t in q.data.values())


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_zeros_and_the_largest_entry_are_exact(fmt):
    w = drawn(4, 64)
    w[1] = 0
    w[2, 5] = 9.0
    back = fmt.dequant(fmt.requant(w))
    assert not back[1].any() or isinstance(fmt, NF4)
    assert float(back[2, 5]) == pytest.approx(9.0, rel=1e-6)
    assert not fmt.dequant(fmt.requant(torch.zeros(4, 64))).any()


def test_nf4_is_nearest_level_by_definition():
    w = drawn(7, 13)
    q = NF4(block_size=16).requant(w)
    flat = w.flatten()
    for i in range(0, len(flat), 16):
        block = flat[i : i + 16].double()
        levels = torch.tensor(LEVELS, dtype=torch.float64) * block.abs().max()
        nearest = levels[(block[:, None] - levels).abs().argmin(1)]
        torch.testing.assert_close(NF4(block_size=16).dequant(q).flatten()[i : i + 16].double(), nearest, rtol=1e-6, atol=1e-7)


def test_a_step_is_reached():
    levels = torch.tensor(LEVELS)
    half = (levels[1:] + levels[:-1]) / 2
    w = torch.cat([half, torch.ones(1)])[None]
    for fmt, shape in ((NF4(block_size=16), w), (Int8(), torch.tensor([[127.0, 0.5, 1.5, -2.5]]))):
        q = fmt.requant(shape)
        apart = (fmt.dequant(q) - shape).abs()
        assert float((apart / fmt.step(q)).max()) == pytest.approx(1, rel=1e-5)


def test_the_default_dtype_of_torch_does_not_matter():
    w = drawn(4, 64)
    want = NF4().requant(w)
    torch.set_default_dtype(torch.float64)
    try:
        got = NF4().requant(w)
        assert torch.equal(got.data["qdata"], want.data["qdata"])
        assert {t.dtype for t in got.data.values()} == {torch.uint8, torch.float32}
        assert torch.equal(NF4().dequant(got), NF4().dequant(want))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("fmt", [NF4(block_size=32), Int8()], ids=repr)
def test_decoding_maps_over_stacked_codes_and_compiles(fmt):
    ws = drawn(3, 8, 32)
    each = [fmt.requant(w) for w in ws]
    stacked = tree_map(lambda *t: torch.stack(t), *each)
    got = torch.func.vmap(fmt.dequant)(stacked)
    assert torch.equal(got, torch.stack([fmt.dequant(q) for q in each]))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(fmt.dequant, fullgraph=True, backend="aot_eager")(each[0]), fmt.dequant(each[0]))


def test_what_does_not_fit_a_format_is_refused():
    with pytest.raises(TypeError, match=r"nf4: a floating weight is required, got torch\.int32"):
        NF4().requant(torch.ones(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="int8: a weight that is finite in float32 is required, got NaN or infinity"):
        Int8().requant(torch.full((2, 2), float("inf")))
    with pytest.raises(ValueError, match=r"int8: a weight with rows is required, got \(4,\); leave the weight dense"):
        Int8().requant(torch.ones(4))
    for size in (0, 3, -64):
        with pytest.raises(ValueError, match=f"nf4: block_size must be even and positive, got {size}"):
            NF4(block_size=size)
    for call in (lambda f: f.requant(torch.ones(2, 2)), lambda f: f.decode(None), lambda f: f.step(None)):
        with pytest.raises(TypeError, match="format: a format must define"):
            call(Format())


# -- trees and nets ----------------------------------------------------------------------------------------------------------


def test_quantize_stores_chosen_layers_and_shares_the_rest():
    model, params = functional()
    kept = {k: t.clone() for k, t in params.items()}
    small = quantize(model, params, NF4(), exclude_modules=["down"])
    assert [k for k, v in small.items() if isinstance(v, Quantized)] == ["up.weight"]
    assert all(small[k] is params[k] for k in params if k != "up.weight")
    assert all(torch.equal(params[k], t) for k, t in kept.items())
    back = dequantize(small)
    assert back["down.weight"] is params["down.weight"]
    assert torch.equal(back["up.weight"], NF4().dequant(small["up.weight"]))
    x = drawn(3, 12)
    assert torch.equal(model(small, x), model(back, x))


METHODS = [LoRA(r=2), DoRA(r=2), IA3(), LoHa(r=2), OFT(oft_block_size=2), LoRA(r=2, init_lora_weights="pissa")]


@pytest.mark.parametrize("fmt", [NF4(), Int8()], ids=repr)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'init_lora_weights', '')}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_net_on_a_quantized_base_is_the_net_on_what_it_decodes_to(method, fmt, dtype):
    import dataclasses

    model, params = functional(dtype)
    small = quantize(model, params, fmt)
    net = adapt(model, dataclasses.replace(method, target_modules=["up", "down"]))
    adapter, x = moved(net.init(small, 0)), drawn(5, 12, dtype=dtype)
    back = dequantize(small)
    assert all(torch.equal(s, t) for s, t in zip(*map(leaves_of, (net.init(small, 0), net.init(back, 0))), strict=True))
    assert torch.equal(net(small, adapter, x), net(back, adapter, x))
    merged, _ = net.merge(small, adapter)
    dense, _ = net.merge(back, adapter)
    assert all(torch.equal(merged[k], dense[k]) for k in dense)
    tolerance = 4 * torch.finfo(dtype).eps * 24
    torch.testing.assert_close(model(merged, x), net(small, adapter, x), rtol=tolerance, atol=tolerance)


def leaves_of(adapter):
    return [t for tree in (adapter.params, adapter.consts) for leaves in tree.values() for t in leaves.values()]


def test_gradients_reach_the_adapter_and_nothing_else():
    model, params = functional()
    small = quantize(model, params, NF4())
    net = adapt(model, LoRA(r=2, target_modules=["up", "down"]))
    adapter, x = moved(net.init(small, 0)), drawn(5, 12)

    def loss(p, base):
        return net(base, adapter.replace(params=p), x).square().sum()

    got = torch.func.grad(loss)(adapter.params, small)
    want = torch.func.grad(loss)(adapter.params, dequantize(small))
    for path, leaves in want.items():
        for name, t in leaves.items():
            torch.testing.assert_close(got[path][name], t)
            assert t.any()


def test_an_embedding_and_a_convolution_may_be_stored_too():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.conv = nn.Embedding(20, 8), nn.Conv2d(8, 4, (3, 1))

        def forward(self, ids):
            return self.conv(self.emb(ids).mT[..., None])

    model, params = functionalize(Both())
    small = quantize(model, params, Int8(), target_modules=["emb", "conv"])
    ids = torch.arange(20).reshape(2, 10)
    assert torch.equal(model(small, ids), model(dequantize(small), ids))
    assert float((small["conv.weight"].data["scale"] - params["conv.weight"].flatten(1).abs().amax(1)).abs().max()) < 1e-6


def test_a_tied_weight_is_stored_once_and_an_untied_one_by_its_own_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            return self.head(self.emb(ids))

    model, params = functionalize(Tied())
    small = quantize(model, params, Int8(), target_modules=["head"])
    assert isinstance(small["emb.weight"], Quantized)
    assert small.keys() == params.keys()
    apart = quantize(model, {**params, "head.weight": params["emb.weight"] * 2}, Int8(), target_modules=["head"])
    assert apart["emb.weight"] is params["emb.weight"]
    assert isinstance(apart["head.weight"], Quantized)
    ids = torch.arange(10)[None]
    assert torch.equal(model(apart, ids), model(dequantize(apart), ids))


def test_what_cannot_be_stored_is_refused_by_site():
    model, params = functional()
    with pytest.raises(
        TypeError, match=r"quantize: a format is required, got ABCMeta|quantize: a format is required, got type"
    ):
        quantize(model, params, NF4)
    with pytest.raises(TypeError, match="quantize at 'norm': a layer with a matrix is required, got LayerNorm"):
        quantize(model, params, NF4(), target_modules=["norm"])
    with pytest.raises(NoMatchError, match="every entry of target_modules must match a module, got 'upp'; did you mean 'up'"):
        quantize(model, params, NF4(), target_modules=["upp"])
    small = quantize(model, params, NF4())
    with pytest.raises(
        TypeError, match="quantize at 'up': a dense weight is required, got a Quantized leaf; call dequantize first"
    ):
        quantize(model, small, NF4())
    with pytest.raises(ValueError, match="quantize at 'up': nf4: a weight that is finite in float32 is required"):
        quantize(model, {**params, "up.weight": params["up.weight"] * float("nan")}, NF4())
    with pytest.raises(KeyError, match="params must hold every leaf"):
        quantize(model, {}, NF4())


# -- patterns, reports, devices ------------------------------------------------------------------------------------------------


def test_formats_by_pattern():
    model, params = functional()
    small = quantize(model, params, {"up": NF4(), ".*": Int8()})
    assert isinstance(small["up.weight"].format, NF4)
    assert isinstance(small["down.weight"].format, Int8)
    some = quantize(model, params, {"down": None, ".*": Int8()})
    assert some["down.weight"] is params["down.weight"]
    assert isinstance(some["up.weight"], Quantized)
    with pytest.raises(NoMatchError, match=r"quantize: every pattern must match a target, got 'upp'; did you mean 'up'"):
        quantize(model, params, {"upp": NF4(), ".*": Int8()})
    with pytest.raises(NoMatchError, match=r"quantize at 'down': a pattern must name every target, got 'up'; add '\.\*' with"):
        quantize(model, params, {"up": NF4()})
    with pytest.raises(TypeError, match=r"quantize: a format is required, got str; pass an instance such as NF4\(\)"):
        quantize(model, params, {"up": "nf4"})


def test_what_does_not_fit_is_refused_before_any_work_or_left_dense():
    from funcpeft import NVFP4

    model, params = functional()  # in_features 12 and 24
    with pytest.raises(
        ValueError, match=r"quantize at 'up': nvfp4: .*got \(24, 12\); leave it out with exclude_modules, or pass"
    ):
        quantize(model, params, NVFP4())
    small = quantize(model, {**params, "norm.bias": params["norm.bias"]}, NVFP4(), misfits="dense")
    assert not any(isinstance(v, Quantized) for v in small.values())
    with pytest.raises(ValueError, match="quantize: misfits must be one of 'raise', 'dense', got 'skip'"):
        quantize(model, params, NF4(), misfits="skip")


def test_the_order_of_arguments_is_checked():
    model, params = functional()
    with pytest.raises(TypeError, match="quantize: a Model is required, got dict; the model comes first, then params"):
        quantize(params, model, NF4())


def test_progress_is_shown_when_asked_for(capsys):
    model, params = functional()
    quantize(model, params, NF4(), progress=True)
    assert "quantize: 100%" in capsys.readouterr().err
    quantize(model, params, NF4(), progress=False)
    assert not capsys.readouterr().err


def test_a_report_has_bytes_and_errors_of_every_leaf():
    from funcpeft import quantization_report

    model, params = functional()
    small = quantize(model, params, {"up": NF4(), ".*": Int8()})
    report = quantization_report(params, small)
    row, w = report.sites["up.weight"], params["up.weight"]
    back = NF4().dequant(small["up.weight"])
    assert int(row["before"]) == w.nbytes
    assert int(row["after"]) == small["up.weight"].nbytes
    assert float(row["rel_error"]) == pytest.approx(float((back - w).norm() / w.norm()), rel=1e-6)
    assert float(row["max_error"]) == pytest.approx(float((back - w).abs().max()), rel=1e-6)
    assert 0 < float(row["steps"]) <= 1 + 1e-5
    assert report.total("before") == sum(t.nbytes for t in params.values())
    assert report.total("after") == sum(t.nbytes for t in small.values())
    text = str(report)
    assert "NF4()" in text
    assert "Int8()" in text
    assert f"{report.total('before'):,} bytes before" in text
    with pytest.raises(KeyError, match="QuantizationReport: column must be one of 'before', 'after', got 'error'"):
        report.total("error")
    with pytest.raises(KeyError, match=r"quantization_report: both params must have the same keys, got 'up\.bias'"):
        quantization_report({k: v for k, v in params.items() if k != "up.bias"}, small)
    with pytest.raises(ValueError, match=r"quantization_report at 'up\.weight': the shape must be \(24, 12\), got \(3, 3\)"):
        quantization_report({**params, "up.weight": torch.ones(3, 3)}, small)


def test_a_table_of_sites_says_how_each_is_stored():
    model, params = functional()
    net = adapt(model, LoRA(r=2, target_modules=["up", "down"]))
    text = net.table(quantize(model, params, NF4(), exclude_modules=["down"]))
    assert "stored as" in text
    assert "NF4()" in text
    assert "dense" in text
    assert "stored as" not in str(net)


def test_a_dtype_cast_moves_no_code_and_a_device_moves_every_tensor():
    from funcpeft import FP8, to

    model, params = functional()
    for fmt in (NF4(), Int8(), FP8(), NF4(double_quant=True)):
        small = quantize(model, params, fmt)
        half = to(small, dtype=torch.bfloat16)
        for name, t in small["up.weight"].data.items():
            assert half["up.weight"].data[name].dtype == t.dtype
        assert half["up.weight"].dtype == torch.bfloat16
        assert torch.equal(fmt.dequant(half["up.weight"]), fmt.dequant(small["up.weight"]).bfloat16())
        assert half["norm.weight"].dtype == torch.bfloat16
        assert small["norm.weight"].dtype == torch.float32
        there = to(small, device="meta")
        assert {t.device.type for t in there["up.weight"].data.values()} == {"meta"}
        assert there["norm.weight"].device.type == "meta"
    ids = {"ids": torch.arange(3), "adapter": LoRA(r=2)}
    assert to({"ids": ids["ids"]}, dtype=torch.float64)["ids"].dtype == torch.int64
    with pytest.raises(ValueError, match=r"to: dtype must be a floating dtype, got torch\.int8"):
        to(params, dtype=torch.int8)


def test_large_weights_are_decoded_again_and_small_ones_kept(monkeypatch):
    from funcpeft import storage

    model, params = functional()
    small, x = quantize(model, params, NF4()), drawn(5, 12).requires_grad_()

    def kept():
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            model(small, x).sum().backward()
        return {(24, 12), (12, 24)} & set(shapes)

    assert kept()
    monkeypatch.setattr(storage, "RECOMPUTE_FROM", 1)
    assert not kept()


def test_input_and_output_side_methods_never_make_a_stored_base_dense(monkeypatch):
    from funcpeft import Context, methods, storage

    model, params = functional()
    small, x, decoded = quantize(model, params, NF4()), drawn(5, 12), []
    right = storage.product

    def product(kind, x, q, bias, **kwargs):
        decoded.append("product")
        out = right(kind, x, q, bias, **kwargs)
        assert decoded.pop() == "product"
        return out

    plain = NF4.dequant

    def dequant(self, q):
        assert decoded, "decoded outside of the product"
        return plain(self, q)

    tried = []
    for name in methods.__all__:
        method = getattr(methods, name).examples()[0]
        if not method.lean("linear") or "linear" not in method.kinds or method.wraps or method.takes_any:
            continue
        net = adapt(model, dataclasses.replace(method, target_modules=["up", "down"], **_without_patterns(method)))
        adapter = moved(net.init(small, 0, **method.sample_needs(net.bases(net.entries[0], small), 0)))
        with monkeypatch.context() as patch:
            patch.setattr("funcpeft.weights.product", product)
            patch.setattr(NF4, "dequant", dequant)
            net(small, adapter, x, context=Context(values=method.sample_values(len(x))))
        tried.append(name)
    assert {"LoRA", "IA3", "OFT"} <= set(tried)


def _without_patterns(method):
    blocked = {"use_bdlora": {"target_modules_bd_a": ["up"], "target_modules_bd_b": ["down"], "nblocks": 2}}
    fields = {f.name for f in dataclasses.fields(method)} - {"layers_pattern"}
    return {n: {} for n in fields if n.endswith("_pattern")} | {n: v for n, v in blocked.items() if n in fields}


def test_the_kernel_of_bitsandbytes_is_used_where_it_is_right(monkeypatch):
    import sys

    import bitsandbytes  # noqa: F401

    from funcpeft import FP4

    right = torch.ops.bitsandbytes.dequantize_4bit
    calls = []
    monkeypatch.setattr(torch.ops.bitsandbytes, "dequantize_4bit", lambda *args: calls.append(args[4]) or right(*args))

    def plain(q):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "bitsandbytes")
            before = len(calls)
            out = q.format.dequant(q)
            assert len(calls) == before
        return out

    for fmt in (NF4(), FP4(block_size=32), NF4(double_quant=True)):
        for shape, taken in (((16, 128), True), ((96, 80), False), ((4, 4, 4, 4), True), ((7, 11), False)):
            for dtype in (torch.float32, torch.bfloat16):
                q = fmt.requant(drawn(*shape, dtype=dtype))
                calls.clear()
                got = fmt.dequant(q)
                assert bool(calls) == (taken and (shape != (16, 128) or 128 % fmt.block_size == 0))
                assert torch.equal(got, plain(q))
    q = NF4().requant(drawn(16, 128))
    calls.clear()
    many = tree_map(lambda t: torch.stack((t, t)), q)
    assert torch.equal(torch.func.vmap(NF4().dequant)(many)[1], plain(q))
    scale = q.data["scale"].clone().requires_grad_()
    NF4().dequant(dataclasses.replace(q, data={**q.data, "scale": scale})).sum().backward()
    assert scale.grad.any()
    assert not calls


# -- what a hostile reader found -----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head, self.other = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False), nn.Linear(6, 6)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.other(self.emb(ids)))


def test_layers_that_share_a_weight_cannot_be_stored_differently():
    model, params = functionalize(Tied())
    for formats in ({"emb": NF4(), "head": None, ".*": None}, {"head": Int8(), "emb": NF4(), ".*": None}):
        with pytest.raises(ValueError, match=r"quantize at 'head': must be stored as 'emb' is, to whose weight it is tied"):
            quantize(model, params, formats, target_modules=["emb", "head", "other"])
    both = quantize(model, params, {"emb|head": NF4(), ".*": None}, target_modules=["emb", "head", "other"])
    assert isinstance(both["emb.weight"].format, NF4)
    apart = {**params, "head.weight": params["emb.weight"].clone()}
    untied = quantize(model, apart, {"emb": NF4(), "head": Int8(), ".*": None}, target_modules=["emb", "head", "other"])
    assert isinstance(untied["head.weight"].format, Int8)


def test_a_pattern_that_another_hides_is_refused():
    model, params = functional()
    with pytest.raises(NoMatchError, match="every pattern must be the first that matches some target, got 'down'; put"):
        quantize(model, params, {".*": Int8(), "down": NF4()})


def test_weights_beyond_a_range_are_refused():
    from funcpeft import Dense

    with pytest.raises(ValueError, match="dense: a weight within the format's range is required, got a larger one"):
        Dense(storage="float16").requant(torch.full((2, 2), 1e5))
    with pytest.raises(ValueError, match="nf4: a weight that is finite in float32 is required"):
        NF4().requant(torch.full((2, 2), 1e300, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"dtype": torch.float16}, {"dtype": torch.float16, "target": "refit"}])
def test_a_merged_weight_beyond_the_range_of_its_dtype_is_refused(options):
    model, params = functional()
    small = quantize(model, {**params, "up.weight": params["up.weight"] * 1e6}, NF4())
    net = adapt(model, LoRA(r=2, target_modules=["up"]))
    with pytest.raises(ValueError, match=r"merge at 'up': the merged weight must be within the range of torch\.float16"):
        net.merge(small, moved(net.init(small, 0)), **options)


def test_buffers_keep_their_dtype_when_the_model_is_named():
    from funcpeft import to

    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model, params = functionalize(module)
    half = to(params, dtype=torch.bfloat16, model=model)
    assert half["1.running_mean"].dtype == torch.float32
    assert half["1.weight"].dtype == torch.bfloat16
    assert to(params, dtype=torch.bfloat16)["1.running_mean"].dtype == torch.bfloat16


def test_params_and_adapters_are_saved_by_torch(tmp_path):
    model, params = functional()
    small = quantize(model, params, {"up": NF4(double_quant=True), ".*": Int8()})
    net = adapt(model, LoRA(r=2, target_modules=["up"]))
    adapter = net.init(small, 0)
    torch.save({"params": small, "adapter": adapter}, tmp_path / "all.pt")
    back = torch.load(tmp_path / "all.pt")
    x = drawn(3, 12)
    assert torch.equal(net(back["params"], back["adapter"], x), net(small, adapter, x))


def test_a_blocked_import_does_not_break_decoding(monkeypatch):
    import sys

    q = NF4().requant(drawn(16, 128))
    want = NF4().dequant(q)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert torch.equal(NF4().dequant(q), want)
