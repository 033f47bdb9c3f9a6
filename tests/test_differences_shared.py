"""Where peft 0.21 is wrong about methods with shared or frozen factors, each against a computation of its own."""

from __future__ import annotations

import copy
import types
import warnings

import bitsandbytes as bnb
import bitsandbytes.functional as kernels
import peft
import pytest
import torch
from differences import differs
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import funcpeft as fp
from funcpeft.interop.modules import functionalize
from funcpeft.rng import stream
from funcpeft.tree import tree_map

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:_check_is_size")


class Site(nn.Module):
    """One layer under a name."""

    def __init__(self, layer):
        super().__init__()
        self.site = layer

    def forward(self, x):
        return self.site(x)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.site = nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.site(torch.tanh(self.first(x)))


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


# -- on stored weights -------------------------------------------------------------------------------------------------------


def four_bit():
    """Returns a model of one layer that bitsandbytes stores in four bits, the same at every call."""
    torch.manual_seed(4)
    plain = nn.Linear(64, 64)
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=False)
    layer.load_state_dict(plain.state_dict())
    module = Site(layer.to("cpu"))
    module.is_loaded_in_8bit, module.is_loaded_in_4bit = False, True
    module.config = types.SimpleNamespace(quantization_config=None, to_dict=dict)
    return module.train()  # in eval mode the layer repacks its weight


def decoded(layer):
    return kernels.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@differs(
    "RandLoRA",
    "on bitsandbytes layers merging multiplies the factors in the wrong order",
    "merging adds what the forward does",
)
def test_randlora_merges_into_four_bits(tmp_path):
    config = peft.RandLoraConfig(r=16, randlora_alpha=16, target_modules=["site"])
    wrapped, x = shift(theirs(four_bit(), config), 0.02).train(), torch.eye(64)
    layer = wrapped.base_model.model.site
    quietly(wrapped.save_pretrained, tmp_path)
    model, params = functionalize(four_bit())
    net, adapter = fp.load_peft(model, params, tmp_path)
    merged, _ = net.merge(params, adapter)
    with torch.no_grad():
        update = (wrapped(x) - layer.base_layer(x)).T
        torch.testing.assert_close(net(params, adapter, x).T, wrapped(x).T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merged["site.weight"] - decoded(layer.base_layer), update, rtol=1e-4, atol=1e-4)
        added = layer.get_delta_weight("default")  # which is what its merge adds
    assert float((added - update).abs().max()) > 0.5 * float(update.abs().max())


@differs(
    "UniLoRA",
    "on bitsandbytes layers the scales are cast to the integers of the stored weight, hence zero: the adapter does nothing",
    "scales are floats",
)
def test_unilora_acts_on_four_bits():
    config = peft.UniLoraConfig(r=2, theta_d_length=11, target_modules=["site"])
    wrapped, x = shift(theirs(four_bit(), config)).train(), drawn(3, 64).float()
    layer = wrapped.base_model.model.site
    model, params = functionalize(four_bit())
    net = fp.adapt(model, fp.UniLoRA(r=2, theta_d_length=11, target_modules=["site"]))
    theta = wrapped.base_model.unilora_theta_d["default"].detach()
    fresh = net.init(params, 0)
    adapter = fresh.replace(params={"": {"theta": theta}})
    consts = adapter.consts["site"]
    a, b = theta[consts["iA"]] * consts["sA"], theta[consts["iB"]] * consts["sB"]
    with torch.no_grad():
        want = x @ (decoded(layer.base_layer) + b @ a).T + layer.base_layer.bias
        torch.testing.assert_close(net(params, adapter, x), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(wrapped(x), layer.base_layer(x))
    assert float((want - model(params, x)).abs().max()) > 1e-3


# -- RandLoRA and PVeRA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "method"),
    [(peft.RandLoraConfig, fp.RandLoRA), (peft.PveraConfig, fp.PVeRA)],
    ids=["RandLoRA", "PVeRA"],
)
@differs("RandLoRA and PVeRA", "a second adapter of smaller rank is accepted, then fails in the forward", "works")
def test_a_second_adapter_of_smaller_rank(config, method):
    module, x = single(), drawn(3, 8)
    wrapped = theirs(copy.deepcopy(module), config(r=4, target_modules=["site"]))
    quietly(wrapped.add_adapter, "other", config(r=2, target_modules=["site"]))
    wrapped.set_adapter("other")
    with pytest.raises(RuntimeError):
        wrapped(x)
    model, params = fp.functionalize(module)
    for r in (4, 2):
        net = fp.adapt(model, method(r=r, target_modules=["site"]))
        adapter = moved(net.init(params, 0))
        torch.testing.assert_close(net(params, adapter, x), model(net.merge(params, adapter)[0], x))


@differs("RandLoRA", "sparse bases that are all zero are divided by zero: NaN everywhere", "refused by name")
def test_randlora_of_an_empty_sparse_basis():
    fields = {"r": 1, "sparse": True, "target_modules": ["site"]}

    def make():
        return nn.Linear(2, 6)

    assert not bool(((torch.rand(2, generator=stream(0).generator) - 0.5).abs() > 1 / 3).any())
    model, params = fp.functionalize(single(make))
    with pytest.raises(ValueError, match="entries of the bases must not all be equal, got those of key 0; change r or"):
        fp.adapt(model, fp.RandLoRA(**fields)).init(params, 0)
    wrapped = theirs(single(make), peft.RandLoraConfig(**fields))
    assert bool(wrapped(drawn(3, 2)).isnan().all())


@differs(
    "PVeRA",
    "noise comes from the global generator, or with `generator_seed` from one that every call moves on: equal calls differ",
    "noise is a function of the context's seed, or else of `generator_seed`",
)
def test_pvera_draws_the_same_for_the_same_call():
    fields, x = {"r": 3, "sample_at_inference": True, "generator_seed": 2, "target_modules": ["site"]}, drawn(3, 8)
    _, params, net, adapter = ours(single(), fp.PVeRA(**fields))
    assert torch.equal(net(params, adapter, x), net(params, adapter, x))
    wrapped = shift(theirs(single(), peft.PveraConfig(**fields)))
    assert not torch.equal(wrapped(x), wrapped(x))


# -- TinyLoRA ----------------------------------------------------------------------------------------------------------------


@differs(
    "TinyLoRA",
    "P of a second adapter depends on the place of the layer among the first adapter's targets; loaded alone, a file without P "
    "computes something else",
    "P depends on the method's own targets",
)
def test_tinylora_projections_of_a_second_adapter(tmp_path):
    def make():
        torch.manual_seed(4)
        return Two().double().eval()

    fields, x = {"r": 2, "u": 3, "save_projection": False}, drawn(3, 8)
    both, one = (quietly(peft.TinyLoraConfig, **fields, target_modules=names) for names in (["first", "site"], ["site"]))
    wrapped = theirs(make(), both)
    quietly(wrapped.add_adapter, "other", one)
    wrapped.set_adapter("other")
    held = wrapped.base_model.model.site.tinylora_P["other"]
    quietly(shift(wrapped).save_pretrained, tmp_path, selected_adapters=["other"])
    model, params = fp.functionalize(make())
    net, adapter = fp.load_peft(model, params, tmp_path / "other")
    own = torch.normal(0.0, 2**-0.5, (3, 2, 2), generator=stream(42).generator).double()
    assert torch.equal(adapter.consts["site"]["P"], own)
    assert not torch.equal(held, own)
    alone = quietly(peft.PeftModel.from_pretrained, make(), tmp_path / "other").eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(x), net(params, adapter, x))
        assert float((wrapped(x) - alone(x)).abs().max()) > 1e-3


@differs(
    "TinyLoRA",
    "at an embedding that scales what it looks up, the update is added unscaled, but merged it is scaled",
    "scaled both ways",
)
def test_tinylora_of_a_scaled_embedding():
    def make():
        return Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=3.0)

    ids = torch.arange(9)[None]
    model, params, net, adapter = ours(single(make), fp.TinyLoRA(r=2, u=3, target_modules=["site"]))
    leaves = {**adapter.consts["site"], **adapter.params["group 0"]}
    table = params["site.weight"] + leaves["B"] @ torch.einsum("u,urs->rs", leaves["v"], leaves["P"]) @ leaves["A"]
    torch.testing.assert_close(net(params, adapter, ids)[0], 3 * table)
    torch.testing.assert_close(model(net.merge(params, adapter)[0], ids)[0], 3 * table)
    wrapped = shift(theirs(single(make), peft.TinyLoraConfig(r=2, u=3, target_modules=["site"])))
    with torch.no_grad():
        before = wrapped(ids)
        quietly(wrapped.merge_adapter)
        assert float((wrapped(ids) - before).abs().max()) > 1e-3


@differs("TinyLoRA", "`init_weights=False` leaves v in uninitialised memory", "refused, but for reading a file")
def test_tinylora_without_a_start(monkeypatch):
    fields = {"r": 2, "u": 3, "init_weights": False, "target_modules": ["site"]}
    model, params = fp.functionalize(single())
    with pytest.raises(ValueError, match="init_weights must be True or 'uniform' where v is not read from a file"):
        fp.adapt(model, fp.TinyLoRA(**fields)).init(params, 0)
    empty = torch.empty
    module = single()
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    wrapped = theirs(module, peft.TinyLoraConfig(**fields))
    assert bool(wrapped.base_model.tinylora_v["default"]["0"].isnan().all())


# -- VB-LoRA -----------------------------------------------------------------------------------------------------------------


def banked(dtype, k=2, logits=None):
    """Returns peft's model that saves the top vectors alone."""
    fields = {"r": 2, "num_vectors": 7, "vector_length": 2, "topk": k, "save_only_topk_weights": True}
    wrapped = shift(theirs(single(dtype=dtype), peft.VBLoRAConfig(**fields, target_modules=["site"])), 1.0)
    if logits is not None:
        with torch.no_grad():
            wrapped.base_model.model.site.vblora_logits_A["default"].copy_(logits)
    return wrapped


@differs("VBLoRA", "training from a file of the top vectors alone raises", "trains the weights of the vectors it chose")
def test_vblora_trains_from_the_top_vectors(tmp_path):
    wrapped, x = banked(torch.float32), drawn(3, 8).float()
    quietly(wrapped.save_pretrained, tmp_path)
    net, adapter = fp.load_peft(*fp.functionalize(single(dtype=torch.float32)), tmp_path)
    _, params = fp.functionalize(single(dtype=torch.float32))

    def loss(p):
        return net(params, adapter.replace(params=p), x, context=fp.Context(training=True, seed=0)).square().sum()

    grads = torch.func.grad(loss)(adapter.params)
    wrapped(x).square().sum().backward()  # before it is saved, peft trains it
    for name in ("A", "B"):
        want = getattr(wrapped.base_model.model.site, f"vblora_logits_{name}")["default"].grad
        torch.testing.assert_close(grads["site"][f"L{name}"], want, rtol=1e-4, atol=1e-4)
    back = quietly(peft.PeftModel.from_pretrained, single(dtype=torch.float32), tmp_path, is_trainable=True).train()
    with pytest.raises(RuntimeError, match="Found infinity values in VB-LoRA logits"):
        back(x)


@differs(
    "VBLoRA",
    "the last of three or more top weights, which a file leaves out, can come out below zero by rounding: NaN",
    "clamped",
)
def test_vblora_of_weights_that_sum_to_more_than_one(tmp_path):
    gen = torch.Generator().manual_seed(0)
    rows = 30 * torch.randn(4096, 7, generator=gen)
    weights = torch.softmax(rows.topk(4, dim=-1).values, -1)[:, :-1]
    row = rows[int(weights.sum(-1).argmax())]
    assert float(torch.softmax(row.topk(4).values, -1)[:-1].sum()) > 1
    wrapped, x = banked(torch.float32, 4, row.expand(2, 4, 7)), drawn(3, 8).float()
    quietly(wrapped.save_pretrained, tmp_path)
    net, adapter = fp.load_peft(*fp.functionalize(single(dtype=torch.float32)), tmp_path)
    _, params = fp.functionalize(single(dtype=torch.float32))
    back = quietly(peft.PeftModel.from_pretrained, single(dtype=torch.float32), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(params, adapter, x), wrapped(x), rtol=1e-4, atol=1e-4)
        assert bool(back(x).isnan().any())


@differs("VBLoRA", "a file of the top vectors of a float64 model cannot be read again", "works")
def test_vblora_reads_the_top_vectors_of_a_double_model(tmp_path):
    wrapped, x = banked(torch.float64), drawn(3, 8)
    quietly(wrapped.save_pretrained, tmp_path)
    model, params = fp.functionalize(single())
    net, adapter = fp.load_peft(model, params, tmp_path)
    torch.testing.assert_close(net(params, adapter, x), wrapped(x).detach())
    with pytest.raises(RuntimeError, match="dtype"):
        quietly(peft.PeftModel.from_pretrained, single(), tmp_path)


@differs("VBLoRA", "`topk` above `num_vectors` is accepted, then fails in the forward", "refused by name")
def test_vblora_of_more_vectors_than_the_bank_has():
    with pytest.raises(ValueError, match="topk must be at most num_vectors = 3, got 4"):
        fp.VBLoRA(num_vectors=3, topk=4)
    config = peft.VBLoRAConfig(r=2, num_vectors=3, vector_length=2, topk=4, target_modules=["site"])
    wrapped = theirs(single(), config)
    with pytest.raises(RuntimeError):
        wrapped(drawn(3, 8))


# -- Super-Tuning ------------------------------------------------------------------------------------------------------------


@differs("SuperTuning", "the low-rank part is computed in float32, also on a float64 model", "float64")
def test_supertuning_computes_in_the_models_precision():
    x = drawn(3, 8)
    _, params, net, adapter = ours(single(), fp.SuperTuning(sparsity=0.9, r=3, lora_alpha=5, target_modules=["site"]))
    a, b, v = (adapter.params["site"][n] for n in "ABv")
    weight = params["site.weight"].flatten().clone()
    weight[adapter.consts["site"]["i"].long()] += v
    want = x @ (weight.view(6, 8) + 5 / 3 * b @ a).T + params["site.bias"]
    torch.testing.assert_close(net(params, adapter, x), want, rtol=1e-12, atol=1e-12)
    config = peft.SupertuningConfig(sparsity=0.9, r=3, lora_alpha=5, target_modules=["site"])
    wrapped = theirs(single(), config)
    layer = wrapped.base_model.model.site
    with torch.no_grad():
        layer.supertuning_values["default"].copy_(v)
        layer.supertuning_lora_A["default"].weight.copy_(a)
        layer.supertuning_lora_B["default"].weight.copy_(b)
        exact = net(
            params,
            adapter.replace(params={"site": {n: t.float().double() for n, t in adapter.params["site"].items()}}),
            x,
        )
        assert 1e-9 < float((wrapped(x) - exact).abs().max()) < 1e-5
