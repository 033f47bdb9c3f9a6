"""Where peft 0.21 is wrong about the methods that were here first, each against a computation of its own."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import zoo
from differences import differs
from torch import nn

import funcpeft as fp
from funcpeft.tree import tree_map


class Site(nn.Module):
    """One layer under a name."""

    def __init__(self, layer):
        super().__init__()
        self.site = layer

    def forward(self, x):
        return self.site(x)


def single(make=lambda: nn.Linear(8, 6), dtype=torch.float64):
    torch.manual_seed(4)
    return Site(make()).to(dtype).eval()


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(adapter, scale=0.3):
    gen = torch.Generator().manual_seed(7)
    return adapter.replace(
        params=tree_map(lambda t: t + scale * torch.randn(t.shape, generator=gen, dtype=t.dtype), adapter.params)
    )


def ours(module, method):
    model, params = fp.functionalize(module)
    net = fp.adapt(model, method)
    return model, params, net, moved(net.init(params, 0))


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def theirs(module, config):
    torch.manual_seed(5)
    return quietly(peft.get_peft_model, module, config).eval()


def shift(wrapped, scale=0.3):
    torch.manual_seed(9)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn_like(p))
    return wrapped


# -- LoRA --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
@differs(
    "LoRA",
    "PiSSA and OLoRA change the base, and again at load; on a bfloat16 base the two halves no longer sum to it",
    "the base stays; the update is measured from its first factors",
)
def test_a_start_from_the_weights_factors_leaves_the_base(init):
    module = single(dtype=torch.bfloat16)
    before = module.site.weight.clone()
    model, params, net, _ = ours(module, fp.LoRA(r=2, init_lora_weights=init, target_modules=["site"]))
    x = drawn(5, 8).bfloat16()
    assert torch.equal(net(params, net.init(params, 0), x), model(params, x))
    assert torch.equal(params["site.weight"], before)
    wrapped = theirs(copy.deepcopy(module), peft.LoraConfig(r=2, init_lora_weights=init, target_modules=["site"]))
    assert not torch.equal(wrapped.base_model.model.site.base_layer.weight, before)
    assert not torch.equal(wrapped(x), module(x))


# -- DoRA --------------------------------------------------------------------------------------------------------------------


def with_a_row_of_zeros():
    module = single()
    with torch.no_grad():
        module.site.weight[2] = 0
    return module


@differs("DoRA", "a weight row of zeros is divided by its norm: NaN", "the row stays zero")
def test_dora_of_a_row_of_zeros():
    _, params, net, _ = ours(with_a_row_of_zeros(), fp.DoRA(r=2, target_modules=["site"]))
    x = drawn(3, 8)
    got = net(params, net.init(params, 0), x)
    assert torch.allclose(got, x @ params["site.weight"].T + params["site.bias"])
    wrapped = theirs(with_a_row_of_zeros(), peft.LoraConfig(r=2, use_dora=True, target_modules=["site"]))
    assert wrapped(x).isnan().any()


@differs("DoRA", "unmerging reads a cache in the layer, gone after a reload", "refused with the reason; keep the base params")
def test_dora_unmerges_from_a_cache():
    _, params, net, adapter = ours(single(), fp.DoRA(r=2, target_modules=["site"]))
    merged, _ = net.merge(params, adapter)
    with pytest.raises(fp.NoMergedFormError, match="merging does not invert"):
        net.unmerge(merged, adapter)
    wrapped = theirs(single(), peft.LoraConfig(r=2, use_dora=True, target_modules=["site"]))
    wrapped.merge_adapter()
    layer = wrapped.base_model.model.site
    layer._caches.clear()
    with pytest.raises((KeyError, TypeError, ValueError)):
        wrapped.unmerge_adapter()


# -- LoHa and LoKr -----------------------------------------------------------------------------------------------------------


@differs("LoHa", "`rank_dropout` gives NaN when every row is dropped", "zero")
def test_loha_with_every_row_dropped():
    _, params, net, adapter = ours(single(), fp.LoHa(r=2, rank_dropout=0.999999, target_modules=["site"]))
    x = drawn(3, 8)
    got = net(params, adapter, x, context=fp.Context(training=True, seed=0))
    assert torch.allclose(got, x @ params["site.weight"].T + params["site.bias"])
    wrapped = shift(theirs(single(), peft.LoHaConfig(r=2, rank_dropout=0.999999, target_modules=["site"])))
    assert wrapped.train()(x).isnan().any()


@differs("LoHa", "alpha / r is rounded to float32, also on a float64 model", "float64")
def test_loha_scales_in_float64():
    _, params, net, adapter = ours(single(), fp.LoHa(r=3, alpha=5, target_modules=["site"]))
    leaves = adapter.params["site"]
    update = (leaves["w1a"] @ leaves["w1b"]) * (leaves["w2a"] @ leaves["w2b"]) * (5 / 3)
    merged, _ = net.merge(params, adapter)
    torch.testing.assert_close(merged["site.weight"] - params["site.weight"], update, rtol=1e-12, atol=1e-14)
    wrapped = theirs(single(), peft.LoHaConfig(r=3, alpha=5, target_modules=["site"]))
    layer = wrapped.base_model.model.site
    with torch.no_grad():
        for name in ("w1_a", "w1_b", "w2_a", "w2_b"):
            getattr(layer, f"hada_{name}")["default"].copy_(leaves[name.replace("_", "")])
    wrong = (layer.get_delta_weight("default").detach() - update).abs().max() / update.abs().max()
    assert float(wrong) > 1e-9


@differs("LoKr", "`use_effective_conv2d` on `Conv1d` with r = 1: an error in the forward", "works")
def test_lokr_of_a_convolution_over_one_axis_with_rank_one():
    def make():
        return nn.Conv1d(8, 8, 3)

    x = drawn(2, 8, 7)
    method = fp.LoKr(r=1, use_effective_conv2d=True, decompose_factor=2, target_modules=["site"])
    model, params, net, adapter = ours(single(make), method)
    merged, _ = net.merge(params, adapter)
    assert torch.allclose(net(params, adapter, x), model(merged, x))
    config = peft.LoKrConfig(r=1, use_effective_conv2d=True, decompose_factor=2, target_modules=["site"])
    wrapped = shift(theirs(single(make), config))
    with pytest.raises(RuntimeError):
        wrapped(x)


# -- OFT ---------------------------------------------------------------------------------------------------------------------


@differs("OFT", "a four-dimensional input of a linear layer is taken for an image: an error", "works")
def test_oft_of_a_four_dimensional_input():
    x = drawn(2, 3, 4, 8)
    _, params, net, adapter = ours(single(), fp.OFT(oft_block_size=4, target_modules=["site"]))
    got = net(params, adapter, x)
    assert torch.allclose(got.flatten(0, 2), net(params, adapter, x.flatten(0, 2)))
    wrapped = theirs(single(), peft.OFTConfig(oft_block_size=4, target_modules=["site"]))
    with pytest.raises((RuntimeError, ValueError)):
        wrapped(x)


@differs("OFT", "`module_dropout` does nothing", "drops whole blocks in training")
def test_oft_drops_blocks():
    x = drawn(3, 8)
    _, params, net, adapter = ours(single(), fp.OFT(oft_block_size=2, module_dropout=0.5, target_modules=["site"]))
    outs = [net(params, adapter, x, context=fp.Context(training=True, seed=s)) for s in range(6)]
    assert any(not torch.allclose(o, net(params, adapter, x)) for o in outs)
    config = peft.OFTConfig(oft_block_size=2, module_dropout=0.9, target_modules=["site"])
    wrapped = shift(theirs(single(), config)).train()
    assert torch.equal(wrapped(x), wrapped(x))
    assert torch.equal(wrapped(x), wrapped.eval()(x))


@differs("OFT", "with `coft` every forward overwrites the parameter", "the projection is part of the function and its gradient")
def test_coft_writes_no_argument():
    x = drawn(3, 8)
    _, params, net, adapter = ours(single(), fp.OFT(oft_block_size=4, coft=True, eps=0.01, target_modules=["site"]))
    before = tree_map(torch.clone, adapter.params)
    net(params, adapter, x)
    assert torch.equal(before["site"]["Q"], adapter.params["site"]["Q"])
    wrapped = shift(theirs(single(), peft.OFTConfig(oft_block_size=4, coft=True, eps=0.01, target_modules=["site"])))
    weight = next(p for p in wrapped.parameters() if p.requires_grad)
    kept = weight.detach().clone()
    wrapped(x)
    assert not torch.equal(weight, kept)


@differs("OFT", "two adapters are merged in another order than they apply", "nested methods merge as they apply")
def test_two_rotations_merge_as_they_apply():
    x = drawn(3, 8)
    model, params = fp.functionalize(single())
    one = fp.OFT(oft_block_size=4, target_modules=["site"])
    net = fp.adapt(model, [one, one])
    adapters = tuple(moved(a, s) for a, s in zip(net.init(params, 0), (0.3, 0.5), strict=True))
    merged, _ = net.merge(params, adapters)
    assert torch.allclose(model(merged, x), net(params, adapters, x))
    wrapped = theirs(single(), peft.OFTConfig(oft_block_size=4, target_modules=["site"]))
    quietly(wrapped.add_adapter, "other", peft.OFTConfig(oft_block_size=4, target_modules=["site"]))
    torch.manual_seed(9)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "oft_R" in name:
                p.add_(0.3 * torch.randn_like(p))
        wrapped.base_model.set_adapter(["default", "other"])
        before = wrapped(x)
        quietly(wrapped.merge_adapter)
        assert not torch.allclose(wrapped(x), before, atol=1e-3)


# -- others ------------------------------------------------------------------------------------------------------------------


@differs("MiSS", '`"bat"` ignores `miss_dropout`', "drops the update's input")
def test_miss_bat_drops():
    x = drawn(3, 8)
    method = fp.MiSS(r=2, init_weights="bat", miss_dropout=0.5, target_modules=["site"])
    _, params, net, adapter = ours(single(), method)
    assert not torch.allclose(net(params, adapter, x, context=fp.Context(training=True, seed=1)), net(params, adapter, x))
    config = peft.MissConfig(r=2, init_weights="bat", miss_dropout=0.9, target_modules=["site"])
    wrapped = shift(theirs(single(), config)).train()
    assert torch.equal(wrapped(x), wrapped.eval()(x))


@differs("VeRA", "a second adapter of smaller rank is accepted, then fails in the forward", "members of unequal rank stack")
@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
def test_vera_of_unequal_ranks():
    x = drawn(3, 8)
    model, params = fp.functionalize(single())
    small, large = (fp.adapt(model, fp.VeRA(r=r, target_modules=["site"])) for r in (2, 4))
    ads = [moved(net.init(params, 0)) for net in (small, large)]
    got = fp.apply_many(large, params, fp.stack(ads), x, in_dims=None)
    for out, net, a in zip(got, (small, large), ads, strict=True):
        assert torch.allclose(out, net(params, a, x))
    wrapped = theirs(single(), peft.VeraConfig(r=4, target_modules=["site"]))
    quietly(wrapped.add_adapter, "other", peft.VeraConfig(r=2, target_modules=["site"]))
    wrapped.set_adapter("other")
    with pytest.raises(RuntimeError):
        wrapped(x)


@differs("FourierFT", "`random_loc_seed=None` crashes", "refused by name")
def test_fourierft_without_a_seed():
    with pytest.raises(ValueError, match="random_loc_seed"):
        fp.FourierFT(n_frequency=4, random_loc_seed=None)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        theirs(single(), peft.FourierFTConfig(n_frequency=4, random_loc_seed=None, target_modules=["site"]))


@differs("TrainableTokens", "targeting both modules of a tie fails in the forward", "both may be named")
def test_trained_rows_at_both_ends_of_a_tie():
    ids = zoo.ids()
    module = copy.deepcopy(zoo.model("llama_tied")).double()
    both = ["embed_tokens", "lm_head"]
    model, params, net, adapter = ours(module, fp.TrainableTokens(target_modules=both, token_indices=[3, 5]))
    table = params["model.embed_tokens.weight"].clone()
    table[[3, 5]] = adapter.params["model.embed_tokens"]["D"]
    want = model({**params, "model.embed_tokens.weight": table}, input_ids=ids).logits
    assert torch.allclose(net(params, adapter, input_ids=ids).logits, want)
    wrapped = theirs(module, peft.TrainableTokensConfig(target_modules=both, token_indices=[3, 5]))
    with pytest.raises(ValueError, match="unknown layer type"):
        wrapped(ids)


@differs("LNTuning", "several active adapters raise in the forward", "an adapter is an argument: a call takes one")
def test_a_second_tuned_norm():
    wrapped = theirs(single(lambda: nn.LayerNorm(8)), peft.LNTuningConfig(target_modules=["site"]))
    quietly(wrapped.add_adapter, "other", peft.LNTuningConfig(target_modules=["site"]))
    shift(wrapped)
    wrapped.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="adapter"):
        wrapped(drawn(3, 8))
    model, params, net, adapter = ours(single(lambda: nn.LayerNorm(8)), fp.LNTuning(target_modules=["site"]))
    merged, _ = net.merge(params, adapter)
    other = moved(net.init(params, 1), 0.7)
    x = drawn(3, 8)
    assert torch.allclose(model(net.merge(merged, other)[0], x), net(params, other, x))
