"""Variants of LoRA: what the laws do not say (backwards, draws, losses, groups), their errors, and where peft differs."""

from __future__ import annotations

import math
import warnings

import peft
import pytest
import torch
from differences import differs
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn

import funcpeft as fp
from funcpeft.methods.velora import grouped, unit
from funcpeft.tree import tree_map

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def base(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8)).to(dtype)


def ours(method, dtype=torch.float32):
    model, params = fp.functionalize(base(dtype))
    net = fp.adapt(model, method)
    gen = torch.Generator().manual_seed(3)
    adapter = net.init(params, 0)
    moved = tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=gen).to(t), adapter.params)
    return params, net, adapter.replace(params=moved)


def theirs(**fields):
    module = base()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(module, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **fields))


def put(wrapped, adapter, **names):
    layer = wrapped.base_model.model.get_submodule("0")
    leaves = adapter.leaves("0")
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(leaves["A"])
        layer.lora_B["default"].weight.copy_(leaves["B"])
    return layer


# -- KaSA --------------------------------------------------------------------------------------------------------------------


def test_kasa_takes_the_smallest_directions_away():
    params, net, _ = ours(fp.KaSA(r=3, target_modules=["0"]), torch.float64)
    fresh = net.init(params, 0)
    merged, _ = net.merge(params, fresh)
    u, s, vh = torch.linalg.svd(params["0.weight"], full_matrices=False)
    torch.testing.assert_close(merged["0.weight"], (u[:, :5] * s[:5]) @ vh[:5], rtol=1e-5, atol=1e-6)
    again = net.init({**params, "0.weight": merged["0.weight"]}, 0)  # nothing is left to take
    assert float((again.leaves("0")["U"] @ again.leaves("0")["V"]).abs().max()) < 1e-6


def test_kasas_penalty_is_the_papers():
    _, net, adapter = ours(fp.KaSA(r=3, target_modules=["0"], kasa_config={"beta": 0.5, "gamma": 0.25}), torch.float64)
    a, b, d = (adapter.params["0"][n] for n in ("A", "B", "d"))
    eye = torch.eye(3, dtype=a.dtype)
    want = 0.5 * (d**2).sum() + 0.25 * (torch.linalg.norm(b.T @ b - eye) + torch.linalg.norm(a @ a.T - eye))
    torch.testing.assert_close(net.penalty(adapter), want)


@differs(
    "KaSA",
    "the base is truncated in place for good: without the adapter the model is another",
    "the base stays; what is taken away is part of the adapter",
)
def test_kasa_leaves_the_base():
    module = base()
    before = module[0].weight.clone()
    params, *_ = ours(fp.KaSA(r=3, target_modules=["0"]))
    assert torch.equal(params["0.weight"], before)
    wrapped = theirs(kasa_config=peft.KasaConfig())
    with wrapped.disable_adapter():
        assert not torch.allclose(wrapped(X), module(X), atol=1e-3)


# -- BD-LoRA -----------------------------------------------------------------------------------------------------------------


@differs(
    "BDLoRA",
    "`get_delta_weight` of a blocked layer multiplies the stored factor as it is, of another shape",
    "the update is that of the block-diagonal factor",
)
def test_the_update_of_blocks():
    config = {"target_modules_bd_a": ["0"], "nblocks": 2}
    params, net, adapter = ours(fp.BDLoRA(r=4, lora_alpha=6, target_modules=["0"], use_bdlora=config), torch.float64)
    a, b = adapter.params["0"]["A"], adapter.params["0"]["B"]
    dense = torch.zeros(4, 12, dtype=a.dtype)
    dense[:2, :6], dense[2:, 6:] = a[:2], a[2:]
    merged, _ = net.merge(params, adapter)
    torch.testing.assert_close(merged["0.weight"], params["0.weight"] + 1.5 * b @ dense)
    layer = theirs(use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["0"], nblocks=2)).base_model.model.get_submodule("0")
    assert layer.get_delta_weight("default").shape != (8, 12)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"nblocks": 0}, "nblocks of use_bdlora must be a positive integer, got 0"),
        ({"blocks": 2}, "an entry of use_bdlora must be one of 'target_modules_bd_a'"),
        ({"target_modules_bd_a": ["0"], "target_modules_bd_b": ["0"]}, "such that no name is in both of its lists"),
        ({"target_modules_bd_a": ["x"]}, "bdlora at '0': use_bdlora must say which factor is blocked, got neither"),
        ({"target_modules_bd_a": ["0"], "nblocks": 5}, "bdlora at '0': nblocks of use_bdlora must divide in 12"),
    ],
)
def test_blocks_are_checked(config, text):
    with pytest.raises(ValueError, match=text):
        ours(fp.BDLoRA(r=4, target_modules=["0"], use_bdlora=config))


# -- QA-LoRA -----------------------------------------------------------------------------------------------------------------


def test_qalora_is_pefts_variant():
    params, net, adapter = ours(fp.QALoRA(r=4, lora_alpha=6, target_modules=["0"], qalora_group_size=3), torch.float64)
    leaves = adapter.leaves("0")

    class Module:
        in_features, training = 12, False
        lora_A = {"default": nn.Linear(4, 4, bias=False)}
        lora_B = {"default": nn.Linear(4, 8, bias=False)}
        lora_dropout = {"default": nn.Identity()}
        scaling = {"default": 1.5}
        qalora_group_size = {"default": 3}

    Module.lora_A["default"].weight = nn.Parameter(leaves["A"])
    Module.lora_B["default"].weight = nn.Parameter(leaves["B"])
    x = X.double()
    plain = x @ params["0.weight"].T + params["0.bias"]
    want = QALoraLinearVariant.forward(Module, "default", x, plain.clone()).detach()
    torch.testing.assert_close(net(params, adapter, x), want)


@differs(
    "QALoRA", "only applied to GPTQ layers, and silently plain LoRA elsewhere; it cannot be merged", "on every base; merges"
)
def test_qalora_works_on_every_base():
    params, net, adapter = ours(fp.QALoRA(r=4, lora_alpha=6, target_modules=["0"], qalora_group_size=3))
    merged, _ = net.merge(params, adapter)
    torch.testing.assert_close(net.model(merged, X), net(params, adapter, X))
    update = (merged["0.weight"] - params["0.weight"]).unflatten(1, (4, 3))
    torch.testing.assert_close(update, update[..., :1].expand_as(update))  # constant along groups
    layer = theirs(use_qalora=True, qalora_group_size=3).base_model.model.get_submodule("0")
    assert layer.lora_A["default"].weight.shape == (4, 12)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"qalora_group_size": 5}, "qalora at '0': qalora_group_size must divide in 12, got 5"),
        ({"qalora_group_size": 0}, "qalora_group_size must be a positive integer"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights must be True, got 'gaussian'"),
        ({"lora_bias": True}, "lora_bias must be False"),
    ],
)
def test_groups_are_checked(fields, text):
    with pytest.raises(ValueError, match=text):
        ours(fp.QALoRA(r=4, target_modules=["0"], **{"qalora_group_size": 3, **fields}))


# -- VeLoRA ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "batch_average", "batch_average_once"])
@pytest.mark.parametrize("groups", [2, 5])
def test_the_gradients_of_velora_are_pefts(kind, groups):
    config = {"num_groups": groups, "scale": 0.7, "init_type": kind}
    method = fp.VeLoRA(r=4, lora_alpha=6, target_modules=["0"], velora_config=config)
    params, net, adapter = ours(method)
    wrapped = theirs(velora_config=peft.VeloraConfig(**config)).train()
    layer = put(wrapped, adapter)
    if kind == "random":
        layer.lora_velora_embed["default"].copy_(adapter.leaves("0")["e"])
    if kind == "batch_average_once":
        adapter = method.averaged(adapter, {"0": X.mean(0)})
    x = X.clone().requires_grad_()
    wrapped(x).square().sum().backward()

    def loss(p, x):
        return net(params, adapter.replace(params=p), x, context=fp.Context(training=True, seed=0)).square().sum()

    grads, input_grad = torch.func.grad(loss, argnums=(0, 1))(adapter.params, X)
    torch.testing.assert_close(grads["0"]["A"], layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads["0"]["B"], layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(input_grad, x.grad, rtol=1e-4, atol=1e-5)
    plain = torch.func.grad(lambda p: net(params, adapter.replace(params=p), X).square().sum())(adapter.params)
    assert not torch.allclose(plain["0"]["A"], grads["0"]["A"], atol=1e-3)


def test_the_compressed_backward_vmaps_and_compiles():
    method = fp.VeLoRA(r=4, target_modules=["0"], velora_config={"num_groups": 3})
    params, net, _ = ours(method)
    ads = [net.init(params, s) for s in range(3)]

    def grad(a):
        context = fp.Context(training=True, seed=0)
        return torch.func.grad(lambda p: net(params, a.replace(params=p), X, context=context).square().sum())(a.params)

    together = torch.func.vmap(grad)(fp.stack(ads))
    for i, one in enumerate(ads):
        torch.testing.assert_close(together["0"]["B"][i], grad(one)["0"]["B"])
        torch.testing.assert_close(torch.compile(grad, backend="aot_eager")(one)["0"]["A"], grad(one)["0"]["A"])


def test_groups_and_directions():
    assert grouped(torch.arange(5.0), 2).tolist() == [[0, 1, 2], [3, 4, 0]]
    assert torch.allclose(unit(torch.zeros(4)), torch.full((4,), 0.5))
    assert torch.allclose(unit(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))


@differs(
    "VeLoRA",
    "`batch_average`: every training call overwrites a buffer, and after a reload `batch_average_once` does so again",
    "the direction is of the call's batch, or a leaf that `averaged` sets",
)
def test_velora_has_no_hidden_state():
    method = fp.VeLoRA(r=4, target_modules=["0"], velora_config={"num_groups": 3})
    params, net, adapter = ours(method)
    before = adapter.leaves("0")["e"].clone()
    net(params, adapter, X, context=fp.Context(training=True, seed=0))
    assert torch.equal(adapter.leaves("0")["e"], before)
    wrapped = theirs(velora_config=peft.VeloraConfig(num_groups=3)).train()
    layer = wrapped.base_model.model.get_submodule("0")
    kept = layer.lora_velora_embed["default"].clone()
    wrapped(X)
    assert not torch.equal(layer.lora_velora_embed["default"], kept)


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


def montecarlo(**config):
    config = {"num_samples": 3, "sample_scaler": 0.5, **config}
    return ours(fp.MonteCLoRA(r=4, lora_alpha=6, target_modules=["0"], monteclora_config=config), torch.float64)


def test_draws_scatter_around_the_mean_as_the_formula_says():
    params, net, adapter = montecarlo()
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


def test_the_variational_loss():
    _, net, adapter = montecarlo(kl_loss_weight=2.0, dirichlet_prior=0.7)
    assert net.penalty(adapter) == 0
    leaves = adapter.params["0"]
    context = fp.Context(training=True, seed=5)
    got = net.penalty(adapter, context)
    alpha, prior = leaves["omega"].exp(), torch.full((3,), 0.7, dtype=torch.float64)
    dirichlet = torch.distributions.kl_divergence(torch.distributions.Dirichlet(alpha), torch.distributions.Dirichlet(prior))
    scale = torch.diag((2 * leaves["sigma"]).exp())
    wishart = 0.5 * 4 * (scale.trace() - torch.logdet(scale) - 4)
    variance, _ = net.methods[0]._drawn(adapter.leaves("0"), context.at(0).at(net.entries[0].sites["0"].salt, 0))
    normal = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), torch.diag(variance)),
        torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)),
    )
    torch.testing.assert_close(got, 2.0 * (dirichlet + wishart + 3 * normal))


@differs(
    "MonteCLoRA",
    "the divergence of the Dirichlet weights has the wrong sign of a term, and can be negative",
    "that of `torch.distributions`",
)
def test_pefts_dirichlet_divergence_is_none():
    config = peft.MontecloraConfig(num_samples=3, dirichlet_prior=0.7, buffer_size=2)
    layer = theirs(monteclora_config=config).base_model.model.get_submodule("0")
    sampler = layer.lora_monteclora_sampler["default"]
    alpha = torch.tensor([2.0, 0.3, 1.1])
    want = torch.distributions.kl_divergence(
        torch.distributions.Dirichlet(alpha), torch.distributions.Dirichlet(torch.full((3,), 0.7))
    )
    assert abs(float(sampler.dirichlet_kl(alpha) - want)) > 0.1
    ours_ = fp.MonteCLoRA(monteclora_config={"num_samples": 3, "dirichlet_prior": 0.7})._dirichlet(alpha.log())
    torch.testing.assert_close(ours_, want)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"num_samples": 0}, "num_samples of monteclora_config must be a positive integer"),
        ({"dirichlet_prior": 0}, "dirichlet_prior of monteclora_config must be positive"),
        ({"samples": 3}, "an entry of monteclora_config must be one of"),
    ],
)
def test_samples_are_checked(config, text):
    with pytest.raises(ValueError, match=text):
        fp.MonteCLoRA(monteclora_config=config)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kasa_config": {"alpha": 1}}, "an entry of kasa_config must be one of"),
        ({"kasa_config": {"beta": -1}}, "kasa_config must be of non-negative numbers"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, False, 'gaussian' or 'orthogonal'"),
        ({"r": 8}, r"r must be below min\(in, out\) = 8"),
    ],
)
def test_kasa_is_checked(fields, text):
    with pytest.raises(ValueError, match=text):
        ours(fp.KaSA(**{"r": 3, "target_modules": ["0"], **fields}))


def test_a_normal_draw_is_normal():
    from funcpeft import rng

    drawn = rng.gaussian(torch.empty(200_000, dtype=torch.float64), rng.key(3, 4))
    assert abs(float(drawn.mean())) < 4 / math.sqrt(200_000)
    assert abs(float(drawn.var()) - 1) < 0.02
    assert abs(float((drawn**3).mean())) < 0.05
    assert abs(float((drawn**4).mean()) - 3) < 0.1
    uniform = rng.unit(torch.empty(200_000), rng.key(3, 4))
    assert 0 <= float(uniform.min()) < 1e-3 < 0.999 < float(uniform.max()) < 1
    assert not torch.equal(drawn, rng.gaussian(torch.empty(200_000, dtype=torch.float64), rng.key(3, 5)))
