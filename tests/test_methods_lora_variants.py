"""Variants of LoRA: what the laws do not say (backwards, draws, losses, blocks, zeros), parity where rows have none, errors."""

from __future__ import annotations

import copy
import math
import sys
import types
import warnings

import peft
import pytest
import torch
from torch import nn

import funcpeft as fp
from funcpeft import rng
from funcpeft.methods.monteclora import square
from funcpeft.methods.velora import grouped, unit
from funcpeft.tree import tree_map

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
TRAINING = fp.Context(training=True, seed=5)


def base(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8)).to(dtype)


def moved(adapter, seed=3):
    gen = torch.Generator().manual_seed(seed)
    return adapter.replace(params=tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=gen).to(t), adapter.params))


def ours(method, dtype=torch.float32, module=None):
    """Returns params, net and an adapter moved away from its start."""
    model, params = fp.functionalize(base(dtype) if module is None else module)
    net = fp.adapt(model, method)
    return params, net, moved(net.init(params, 0))


def theirs(dtype=torch.float32, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base(dtype), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **fields))


def put(wrapped, adapter):
    """Gives a layer of peft the factors of an adapter."""
    layer = wrapped.base_model.model.get_submodule("0")
    leaves = adapter.leaves("0")
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(leaves["A"])
        layer.lora_B["default"].weight.copy_(leaves["B"])
    return layer


def of_two_ranks(make):
    """Returns params, net, and two adapters of different ranks, the net being of the second."""
    params, _, small = ours(make(2), torch.float64)
    _, net, large = ours(make(4), torch.float64)
    return params, net, [small, moved(large, 8)]


# -- KaSA --------------------------------------------------------------------------------------------------------------------


def test_kasa_takes_the_smallest_directions_away():
    params, net, _ = ours(fp.KaSA(r=3, target_modules=["0"]), torch.float64)
    fresh = net.init(params, 0)
    merged, _ = net.merge(params, fresh)
    u, s, vh = torch.linalg.svd(params["0.weight"], full_matrices=False)
    torch.testing.assert_close(merged["0.weight"], (u[:, :5] * s[:5]) @ vh[:5])
    again = net.init({**params, "0.weight": merged["0.weight"]}, 0)  # nothing is left to take
    assert float((again.leaves("0")["U"] @ again.leaves("0")["V"]).abs().max()) < 1e-12


def test_kasas_update_may_have_a_bias():
    params, net, adapter = ours(fp.KaSA(r=3, target_modules=["0"], lora_bias=True), torch.float64)
    merged, _ = net.merge(params, adapter)
    torch.testing.assert_close(net.model(merged, X.double()), net(params, adapter, X.double()))
    assert not torch.equal(merged["0.bias"], params["0.bias"])


def test_kasas_penalty_and_its_gradient_are_pefts():
    config = {"beta": 0.5, "gamma": 0.25}
    _, net, adapter = ours(fp.KaSA(r=4, lora_alpha=6, target_modules=["0"], kasa_config=config))
    wrapped = theirs(kasa_config=peft.KasaConfig(**config))
    layer = put(wrapped, adapter)
    with torch.no_grad():
        layer.lora_diag["default"].copy_(adapter.leaves("0")["d"])
    want = wrapped.base_model._get_kasa_loss()
    want.backward()
    grads, got = torch.func.grad_and_value(lambda p: net.penalty(adapter.replace(params=p)))(adapter.params)
    torch.testing.assert_close(got, want.detach())
    for name, p in (
        ("A", layer.lora_A["default"].weight),
        ("B", layer.lora_B["default"].weight),
        ("d", layer.lora_diag["default"]),
    ):
        torch.testing.assert_close(grads["0"][name], p.grad)


def test_the_gradient_of_kasas_penalty_is_finite_where_factors_are_orthonormal():
    method = fp.KaSA(r=4, target_modules=["0"])
    _, net, adapter = ours(method)
    perfect = {"A": torch.eye(4, 12), "B": torch.eye(8, 4), "d": torch.zeros(4)}
    grads = torch.func.grad(lambda p: net.penalty(adapter.replace(params=p)))({"0": perfect})
    assert all(not t.any() for t in grads["0"].values())


def test_kasas_penalty_counts_no_padded_rank():
    _, net, members = of_two_ranks(lambda r: fp.KaSA(r=r, target_modules=["0"]))
    together = torch.func.vmap(net.penalty)(fp.stack(members))
    torch.testing.assert_close(together, torch.stack([net.penalty(m) for m in members]))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kasa_config": {"alpha": 1}}, "an entry of kasa_config must be one of 'beta', 'gamma', got 'alpha'"),
        ({"kasa_config": {"beta": -1}}, "kasa_config must be of non-negative numbers"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, False, 'gaussian' or 'orthogonal', got 'pissa'"),
        ({"r": 8}, r"kasa at '0': r must be below min\(in, out\) = 8, or nothing of the weight is left, got 8"),
    ],
)
def test_kasa_is_checked(fields, text):
    with pytest.raises(ValueError, match=text):
        ours(fp.KaSA(**{"r": 3, "target_modules": ["0"], **fields}))


# -- BD-LoRA -----------------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Two layers of one name, told apart by where they are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.mlp = nn.ModuleDict({"out": nn.Linear(12, 8)}), nn.ModuleDict({"out": nn.Linear(8, 6)})

    def forward(self, x):
        return self.mlp["out"](torch.tanh(self.attn["out"](x)))


def test_blocks_are_chosen_by_the_whole_path_as_in_peft(tmp_path):
    config = {"target_modules_bd_a": ["attn"], "target_modules_bd_b": ["mlp"], "nblocks": 2}
    given = peft.LoraConfig(r=4, target_modules=["out"], use_bdlora=peft.BdLoraConfig(**config), init_lora_weights=False)
    wrapped = peft.get_peft_model(Nested(), given).eval()
    with torch.no_grad():
        wrapped.base_model.model.mlp["out"].lora_B["default"].weight.normal_()
    wrapped.save_pretrained(tmp_path)
    model, params = fp.functionalize(Nested())
    net, adapter = fp.load_peft(model, params, tmp_path)
    torch.testing.assert_close(net(params, adapter, X), wrapped(X).detach())
    shapes = {path: {n: tuple(t.shape) for n, t in leaves.items()} for path, leaves in adapter.params.items()}
    assert shapes == {
        "attn.out": {"A": (2, 2, 6), "B": (2, 8, 2)},
        "mlp.out": {"A": (2, 2, 8), "B": (2, 3, 2)},
    }


@pytest.mark.parametrize("side", ["a", "b"])
def test_blocks_of_different_ranks_stack(side):
    def make(r):
        return fp.BDLoRA(r=r, target_modules=["0"], use_bdlora={f"target_modules_bd_{side}": ["0"], "nblocks": 2})

    params, net, members = of_two_ranks(make)
    alone = [fp.adapt(net.model, make(r))(params, m, X.double()) for r, m in zip((2, 4), members, strict=True)]
    many = fp.stack(members)
    torch.testing.assert_close(fp.apply_many(net, params, many, X.double(), in_dims=None), torch.stack(alone))
    for member, back in zip(members, fp.unstack(many), strict=True):
        assert {n: t.shape for n, t in member.leaves("0").items()} == {n: t.shape for n, t in back.leaves("0").items()}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"nblocks": 0}, "nblocks of use_bdlora must be a positive integer, got 0"),
        ({"blocks": 2}, "an entry of use_bdlora must be one of 'target_modules_bd_a'"),
        ({"target_modules_bd_a": "0"}, "use_bdlora must be such that what names modules are lists"),
        ({"target_modules_bd_a": ["0"], "target_modules_bd_b": ["0"]}, "such that no name is in both of its lists"),
        ({"target_modules_bd_a": ["0"], "target_modules_bd_b": [""]}, "bdlora at '0': use_bdlora must not block both factors"),
        ({"target_modules_bd_a": ["x"]}, "bdlora at '0': use_bdlora must say which factor is blocked, got neither"),
        ({"target_modules_bd_a": ["0"], "nblocks": 5}, "bdlora at '0': nblocks of use_bdlora must divide in 12"),
        ({"target_modules_bd_b": ["0"], "nblocks": 3}, "bdlora at '0': nblocks of use_bdlora must divide out 8"),
        ({"target_modules_bd_b": ["0"], "nblocks": 8}, "bdlora at '0': nblocks of use_bdlora must divide r 4"),
    ],
)
def test_blocks_are_checked(config, text):
    with pytest.raises(ValueError, match=text):
        ours(fp.BDLoRA(r=4, target_modules=["0"], use_bdlora=config))


@pytest.mark.parametrize("method", [fp.BDLoRA, fp.QALoRA])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"init_lora_weights": "olora"}, "init_lora_weights must be True, False or 'gaussian', got 'olora'"),
        ({"lora_bias": True}, "lora_bias must be False"),
    ],
)
def test_factors_of_another_shape_start_from_draws_and_have_no_bias(method, fields, text):
    with pytest.raises(ValueError, match=text):
        method(**fields)


# -- QA-LoRA -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gptq_layers(monkeypatch):
    """Lets peft take a plain linear layer for one of gptqmodel's."""

    class BaseQuantLinear(nn.Linear):
        qweight = torch.empty(0)

    stub = types.ModuleType("gptqmodel.nn_modules.qlinear")
    stub.BaseQuantLinear = BaseQuantLinear
    for name in ("gptqmodel", "gptqmodel.nn_modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr("peft.tuners.lora.gptq.is_gptqmodel_available", lambda: True)
    monkeypatch.setattr("peft.tuners.lora.awq.is_gptqmodel_available", lambda: False)

    def make():
        torch.manual_seed(0)
        return nn.Sequential(BaseQuantLinear(12, 8), nn.Tanh(), BaseQuantLinear(8, 6))

    return make


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)])
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_qalora_is_pefts_on_its_layers(init, shape, gptq_layers, tmp_path):
    fields = {"r": 3, "lora_alpha": 6, "target_modules": ["0", "2"], "use_qalora": True, "qalora_group_size": 4}
    quantized = gptq_layers()
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(quantized, peft.LoraConfig(**fields, init_lora_weights=init)).eval()
    wrapped.save_pretrained(tmp_path / "fresh")
    module = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))
    module.load_state_dict(gptq_layers().state_dict())
    model, params = fp.functionalize(module)
    net, read = fp.load_peft(model, params, tmp_path / "fresh")
    assert type(net.methods[0]) is fp.QALoRA
    drawn = fp.peft_init(net, params, seed=5)
    for path, leaves in read.params.items():
        for name, t in leaves.items():
            assert torch.equal(drawn.params[path][name], t)
    adapter = moved(read)
    fp.save_peft(net, adapter, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(gptq_layers(), tmp_path / "ours").eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(net(params, adapter, x), back(x).detach())
    assert not torch.allclose(net(params, adapter, x), model(params, x), atol=1e-3)


FORMATS = [
    fp.AffineInt(block_size=8),
    fp.AffineInt(block_size=16, symmetric=False, packing="gptq"),
    fp.AffineInt(block_size=(1, 8), bits=8, packing="int8"),
    fp.AffineInt(block_size=8, symmetric=False, packing="hqq", layout="flat"),
    fp.AffineInt(block_size=8, bits=2, packing="quanto", layout="flat"),
]


def stored(format, group=16, kind=nn.Linear):
    torch.manual_seed(0)
    model, params = fp.functionalize(nn.Sequential(kind(32, 32)))
    params = fp.quantize(model, params, format, target_modules=["0"])
    net = fp.adapt(model, fp.QALoRA(r=2, target_modules=["0"], qalora_group_size=group))
    adapter = moved(net.init(params, 0))
    return params, net, adapter, lambda: net.methods[0].into_zeros(adapter.leaves("0"), net.bases(net.entries[0], params)["0"])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_update_fits_into_zeros(format):
    params, net, adapter, made = stored(format)
    weight = made()
    merged, _ = net.merge(params, adapter)
    torch.testing.assert_close(fp.dequantize({"w": weight})["w"], merged["0.weight"], rtol=0, atol=1e-6)
    assert torch.equal(weight.data["qdata"], params["0.weight"].data["qdata"])
    assert torch.equal(weight.data["scale"], params["0.weight"].data["scale"])
    assert "zero_point" in weight.data
    assert "shift" not in weight.data


def test_the_whole_row_may_be_one_block():
    params, net, adapter, made = stored(fp.AffineInt(block_size="row"), group=32)
    torch.testing.assert_close(fp.dequantize({"w": made()})["w"], net.merge(params, adapter)[0]["0.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", [fp.NF4(), fp.AffineInt(block_size=(2, 8))], ids=str)
def test_other_grids_have_no_zeros_for_it(format):
    *_, made = stored(format)
    with pytest.raises(TypeError, match="qalora at '0': zeros of blocks of consecutive inputs are required"):
        made()


def test_columns_in_another_order_have_no_zeros_for_it():
    params, net, adapter, _ = stored(fp.AffineInt(block_size=8))
    leaf = params["0.weight"]
    order = torch.arange(32).flip(0) // 8
    params["0.weight"] = fp.Quantized({**leaf.data, "g_idx": order.to(torch.int32)}, leaf.format, leaf.shape, leaf.dtype)
    with pytest.raises(TypeError, match="zeros of blocks of consecutive inputs are required"):
        net.methods[0].into_zeros(adapter.leaves("0"), net.bases(net.entries[0], params)["0"])


def test_blocks_must_not_cross_groups():
    *_, made = stored(fp.AffineInt(block_size=32))
    with pytest.raises(ValueError, match="qalora at '0': a block of 32 inputs must divide qalora_group_size, got 16"):
        made()


def test_scales_must_not_be_zero():
    params, net, adapter, _ = stored(fp.AffineInt(block_size=8))
    leaf = params["0.weight"]
    data = {**leaf.data, "scale": torch.zeros_like(leaf.data["scale"])}
    params["0.weight"] = fp.Quantized(data, leaf.format, leaf.shape, leaf.dtype)
    with pytest.raises(ValueError, match=r"qalora at '0': scales must not be zero to hold an update, got 0; use net\.merge"):
        net.methods[0].into_zeros(adapter.leaves("0"), net.bases(net.entries[0], params)["0"])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"qalora_group_size": 5}, "qalora at '0': qalora_group_size must divide in 12, got 5"),
        ({"qalora_group_size": 0}, "qalora_group_size must be a positive integer"),
    ],
)
def test_groups_are_checked(fields, text):
    with pytest.raises(ValueError, match=text):
        ours(fp.QALoRA(r=4, target_modules=["0"], **fields))


# -- VeLoRA ------------------------------------------------------------------------------------------------------------------


def compressing(kind="random", groups=5, dtype=torch.float32, **fields):
    config = {"num_groups": groups, "scale": 0.7, "init_type": kind}
    return ours(fp.VeLoRA(r=4, lora_alpha=6, target_modules=["0"], velora_config=config, **fields), dtype)


@pytest.mark.parametrize("kind", ["random", "batch_average", "batch_average_once"])
@pytest.mark.parametrize("groups", [2, 5])
def test_the_gradients_of_velora_are_pefts(kind, groups):
    params, net, adapter = compressing(kind, groups)
    config = peft.VeloraConfig(num_groups=groups, scale=0.7, init_type=kind)
    wrapped = theirs(velora_config=config).train()
    layer = put(wrapped, adapter)
    if kind == "random":
        layer.lora_velora_embed["default"].copy_(adapter.leaves("0")["e"])
    x = X.clone().requires_grad_()
    wrapped(x).square().sum().backward()

    def loss(p, x):
        return net(params, adapter.replace(params=p), x, context=TRAINING).square().sum()

    grads, input_grad = torch.func.grad(loss, argnums=(0, 1))(adapter.params, X)
    torch.testing.assert_close(grads["0"]["A"], layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads["0"]["B"], layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(input_grad, x.grad, rtol=1e-4, atol=1e-5)
    plain = torch.func.grad(lambda p: net(params, adapter.replace(params=p), X).square().sum())(adapter.params)
    assert not torch.allclose(plain["0"]["A"], grads["0"]["A"], atol=1e-3)
    (tangent,) = (tree_map(torch.ones_like, adapter.params),)
    _, forward = torch.func.jvp(lambda p: loss(p, X), (adapter.params,), (tangent,))
    torch.testing.assert_close(forward, sum(t.sum() for t in grads["0"].values()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", [True, "pissa"])
def test_a_training_call_of_velora_computes_the_same_bits(init):
    params, net, adapter = compressing(init_lora_weights=init)
    assert torch.equal(net(params, adapter, X, context=TRAINING), net(params, adapter, X))


def test_with_directions_that_span_all_the_gradient_is_exact():
    config = {"num_groups": 12, "init_type": "random"}  # groups of one number
    params, net, adapter = ours(
        fp.VeLoRA(r=2, target_modules=["0"], init_lora_weights="pissa", velora_config=config), torch.float64
    )

    def grad(context):
        return torch.func.grad(lambda p: net(params, adapter.replace(params=p), X.double(), context=context).square().sum())(
            adapter.params
        )

    for got, want in zip(grad(TRAINING)["0"].values(), grad(fp.Context())["0"].values(), strict=True):
        torch.testing.assert_close(got, want)


def test_velora_keeps_coordinates_and_not_inputs():
    params, net, adapter = compressing(groups=2)
    x = torch.randn(100, 12)
    kept = []

    def keep(t):
        kept.append(t.numel())
        return t

    tracked = tree_map(lambda t: t.detach().requires_grad_(), adapter.params)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        net(params, adapter.replace(params=tracked), x, context=TRAINING)
    assert 200 in kept  # two coordinates of each row
    assert x.numel() not in kept


def test_the_compressed_backward_vmaps_and_compiles():
    params, net, _ = compressing(groups=3)
    members = [moved(net.init(params, s), s) for s in range(3)]

    def grad(a):
        return torch.func.grad(lambda p: net(params, a.replace(params=p), X, context=TRAINING).square().sum())(a.params)

    together = torch.func.vmap(grad)(fp.stack(members))
    compiled = torch.compile(grad, backend="aot_eager", fullgraph=True)
    for i, one in enumerate(members):
        for name in "AB":
            torch.testing.assert_close(together["0"][name][i], grad(one)["0"][name])
            torch.testing.assert_close(compiled(one)["0"][name], grad(one)["0"][name])


def test_groups_and_directions():
    assert grouped(torch.arange(5.0), 2).tolist() == [[0, 1, 2], [3, 4, 0]]
    assert torch.allclose(unit(torch.zeros(4)), torch.full((4,), 0.5))
    assert torch.allclose(unit(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))


def test_a_direction_is_put_in_once():
    params, net, adapter = compressing("batch_average_once", 3)
    method, before = net.methods[0], adapter.leaves("0")["e"]
    assert not before.any()
    settled = method.averaged(adapter, {"0": X.mean(0)})
    want = unit(X.reshape(-1, 4).mean(0))
    torch.testing.assert_close(settled.leaves("0")["e"], want)
    assert not before.any()

    def grad(a, x):
        return torch.func.grad(lambda p: net(params, a.replace(params=p), x, context=TRAINING).square().sum())(a.params)

    torch.testing.assert_close(grad(settled, X), grad(adapter, X))  # until then every batch has its own
    assert not torch.allclose(grad(settled, X[:2])["0"]["A"], grad(adapter, X[:2])["0"]["A"], atol=1e-3)
    with pytest.raises(KeyError, match="velora: averaged: paths must be of sites, got '1'; known are '0'"):
        method.averaged(adapter, {"1": X.mean(0)})
    for mean in (X.mean(0)[:-1], X.mean(0) * float("nan")):
        with pytest.raises(ValueError, match="velora at '0': a mean input must be finite and have shape"):
            method.averaged(adapter, {"0": mean})


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"num_groups": 0}, "num_groups of velora_config must be a positive integer"),
        ({"scale": 0}, "scale of velora_config must be positive"),
        ({"init_type": "once"}, "init_type of velora_config must be one of"),
        ({"groups": 3}, "an entry of velora_config must be one of 'num_groups'"),
    ],
)
def test_compression_is_checked(config, text):
    with pytest.raises(ValueError, match=text):
        fp.VeLoRA(velora_config=config)


# -- MonteCLoRA --------------------------------------------------------------------------------------------------------------


def montecarlo(r=4, **config):
    config = {"num_samples": 3, "sample_scaler": 0.5, **config}
    return fp.MonteCLoRA(r=r, lora_alpha=6, target_modules=["0"], monteclora_config=config)


def test_the_formula_is_pefts_on_the_same_draws():
    params, net, adapter = ours(montecarlo())
    method, leaves = net.methods[0], adapter.leaves("0")
    wrapped = theirs(monteclora_config=peft.MontecloraConfig(num_samples=3, sample_scaler=0.5, buffer_size=2)).train()
    layer = put(wrapped, adapter)
    sampler = layer.lora_monteclora_sampler["default"]
    with torch.no_grad():
        sampler.std_prior.copy_(leaves["sigma"])
        sampler.expert_weights_prior.copy_(leaves["omega"])
    pool = copy.deepcopy(sampler.sampler.buffer[0])
    want = wrapped(X)
    want.square().sum().backward()
    chi = torch.zeros(4, 4)
    chi[:, 0] = pool["z_wishart"].diagonal().sqrt()

    def loss(p):
        own = {**leaves, **p["0"]}
        variance, w = method.variance(own, chi), method.weights(own, pool["z_dirichlet"])
        a = method.perturbed(own, variance, w, pool["z_mvn"].permute(2, 0, 1))
        y = net(params, adapter.replace(params={"0": {**p["0"], "A": a}}), X)
        return y.square().sum(), y

    grads, got = torch.func.grad(loss, has_aux=True)(adapter.params)
    torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)
    found = {
        "A": layer.lora_A["default"].weight,
        "B": layer.lora_B["default"].weight,
        "sigma": sampler.std_prior,
        "omega": sampler.expert_weights_prior,
    }
    for name, p in found.items():
        torch.testing.assert_close(grads["0"][name], p.grad, rtol=1e-3, atol=1e-3 * float(p.grad.abs().max()))


def test_draws_scatter_around_the_mean_as_the_formula_says():
    params, net, adapter = ours(montecarlo(), torch.float64)
    x, leaves = X.double(), adapter.leaves("0")
    seeds = torch.arange(4000)
    outs = torch.func.vmap(lambda s: net(params, adapter, x, context=fp.Context(training=True, seed=s)))(seeds)
    plain = net(params, adapter, x)
    noise = (outs - plain) / 1.5
    # given w the noise of A is normal with variance (0.5)^2 sum w^2 exp(2 sigma_i) chi^2_4, of mean 4
    torch.testing.assert_close(noise.mean(0), torch.zeros_like(plain), atol=0.15 * float(noise.std()), rtol=0)
    variance = (leaves["B"] ** 2 * (2 * leaves["sigma"]).exp()).sum(1) * 4 * 0.25
    expected = (x**2).sum(1)[:, None] * variance
    ratio = noise.var(0) / expected  # the mean of sum w^2: between 1 / n and 1
    assert float(ratio.std() / ratio.mean()) < 0.1
    assert 1 / 3 < float(ratio.mean()) < 1


def test_variances_are_those_of_a_wishart_matrix():
    method, size = montecarlo(), 20_000
    leaves = {"sigma": torch.zeros(4), "rank": torch.tensor(4)}
    seeds = torch.arange(size)

    def drawn(seed):
        context = fp.Context(training=True, seed=seed)
        return method.variance(leaves, square(context.gaussian(torch.empty(16), slot=1), 4))

    got = torch.func.vmap(drawn)(seeds)
    for moment, want in ((1, 4.0), (2, 4.0 * 6), (3, 4.0 * 6 * 8)):  # of chi^2 with 4 degrees of freedom
        torch.testing.assert_close(got.pow(moment).mean(0), torch.full((4,), want), rtol=0.08, atol=0)
    assert float((torch.corrcoef(got.T) - torch.eye(4)).abs().max()) < 5 / math.sqrt(size)


def test_numbers_of_a_square_do_not_depend_on_its_size():
    flat = torch.arange(25)
    assert sorted(square(flat, 5).flatten().tolist()) == list(range(25))
    for size in range(1, 5):
        assert torch.equal(square(flat, 5)[:size, :size], square(flat[: size * size], size))


def test_draws_do_not_depend_on_the_ranks_of_other_members():
    params, net, members = of_two_ranks(montecarlo)
    many = fp.stack(members)

    def loss(a):
        return net(params, a, X.double(), context=TRAINING).square().sum() + net.penalty(a, TRAINING)

    losses = torch.func.vmap(loss)(many)
    torch.testing.assert_close(losses, torch.stack([loss(m) for m in members]))
    grads = torch.func.vmap(torch.func.grad(lambda p, a: loss(a.replace(params=p))))(many.params, many)
    for i, member in enumerate(members):
        alone = torch.func.grad(lambda p, m=member: loss(m.replace(params=p)))(member.params)
        cut = fp.unstack(many.replace(params=grads))[i]
        for name, t in alone["0"].items():
            torch.testing.assert_close(cut.params["0"][name], t)
    for name, axis in (("A", -2), ("B", -1), ("sigma", -1)):  # what is padded stays zero in training
        assert not grads["0"][name][0].narrow(axis, 2, 2).any()


def test_the_variational_loss():
    _, net, adapter = ours(montecarlo(kl_loss_weight=2.0, dirichlet_prior=0.7, use_entropy=True), torch.float64)
    assert net.penalty(adapter) == 0
    leaves = adapter.leaves("0")
    got = net.penalty(adapter, TRAINING)
    alpha, prior = leaves["omega"].exp(), torch.full((3,), 0.7, dtype=torch.float64)
    dirichlet = torch.distributions.kl_divergence(torch.distributions.Dirichlet(alpha), torch.distributions.Dirichlet(prior))
    scale = torch.diag((2 * leaves["sigma"]).exp())
    wishart = 0.5 * 4 * (scale.trace() - torch.logdet(scale) - 4)
    variance, w = net.methods[0].drawn(leaves, TRAINING.at(0).at(net.entries[0].sites["0"].salt, 0))
    one = torch.eye(4, dtype=torch.float64)
    normal = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), torch.diag(variance)),
        torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), one),
    )
    torch.testing.assert_close(got, 2.0 * (dirichlet + wishart + 3 * normal) + (w**2).sum())


def test_the_variational_loss_is_of_the_draws_of_the_call():
    params, net, adapter = ours(montecarlo(use_entropy=True), torch.float64)
    seen = []
    method = net.methods[0]

    class Watching(type(method)):
        def weights(self, leaves, z):
            seen.append(super().weights(leaves, z))
            return seen[-1]

    watched = fp.adapt(net.model, Watching(**{k: v for k, v in method.to_dict().items() if k != "method"}))
    watched(params, adapter, X.double(), context=TRAINING)
    watched.penalty(adapter, TRAINING)
    assert torch.equal(seen[0], seen[1])


def test_the_terms_that_peft_has_right_are_pefts():
    _, net, adapter = ours(montecarlo())
    leaves, method = adapter.leaves("0"), net.methods[0]
    wrapped = theirs(monteclora_config=peft.MontecloraConfig(num_samples=3, buffer_size=2))
    sampler = put(wrapped, adapter).lora_monteclora_sampler["default"]
    torch.testing.assert_close(method.of_wishart(leaves), sampler.wishart_kl(torch.diag(leaves["sigma"].exp())))
    variance = torch.tensor([0.3, 1.0, 2.0, 4.0])
    torch.testing.assert_close(method.of_normal(variance), sampler.multivariate_kl(torch.diag(variance)))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_samples": 0}, "num_samples of monteclora_config must be a positive integer"),
        ({"buffer_size": 0}, "buffer_size of monteclora_config must be a positive integer"),
        ({"dirichlet_prior": 0}, "dirichlet_prior of monteclora_config must be a positive number"),
        ({"sample_scaler": -1}, "sample_scaler of monteclora_config must be a non-negative number"),
        ({"kl_loss_weight": "1"}, "kl_loss_weight of monteclora_config must be a non-negative number"),
        ({"samples": 3}, "an entry of monteclora_config must be one of"),
    ],
)
def test_samples_are_checked(fields, text):
    with pytest.raises(ValueError, match=text):
        fp.MonteCLoRA(monteclora_config=fields)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga", "pissa_niter_4"])
def test_starts_that_change_the_rank_in_a_file_are_refused(init):
    with pytest.raises(ValueError, match="init_lora_weights must be one that keeps the rank and that a file and the base tell"):
        fp.MonteCLoRA(init_lora_weights=init)


def test_a_normal_draw_is_normal():
    drawn = rng.gaussian(torch.empty(200_000, dtype=torch.float64), rng.key(3, 4))
    assert abs(float(drawn.mean())) < 4 / math.sqrt(200_000)
    assert abs(float(drawn.var()) - 1) < 0.02
    assert abs(float((drawn**3).mean())) < 0.05
    assert abs(float((drawn**4).mean()) - 3) < 0.1
    uniform = rng.unit(torch.empty(200_000), rng.key(3, 4))
    assert 0 <= float(uniform.min()) < 1e-3 < 0.999 < float(uniform.max()) < 1
    assert not torch.equal(drawn, rng.gaussian(torch.empty(200_000, dtype=torch.float64), rng.key(3, 5)))
