"""Where peft 0.21 is wrong about variants of LoRA, or keeps state, and results here differ on purpose.

A test fails as well when peft begins to agree: the difference then leaves this file and the docs.
"""

from __future__ import annotations

import warnings

import peft
import torch
from differences import differs
from torch import nn

import funcpeft as fp
from funcpeft.tree import tree_map

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
TRAINING = fp.Context(training=True, seed=0)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8))


def ours(method):
    """Returns params, net and an adapter moved away from its start."""
    model, params = fp.functionalize(base())
    net = fp.adapt(model, method)
    gen = torch.Generator().manual_seed(3)
    adapter = net.init(params, 0)
    return (
        params,
        net,
        adapter.replace(params=tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=gen), adapter.params)),
    )


def theirs(**fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **fields))


def layer_of(wrapped):
    return wrapped.base_model.model.get_submodule("0")


@differs(
    "KaSA",
    "the base is truncated in place for good: without the adapter, and unmerged, it is another",
    "the base stays; what is taken away is part of the adapter",
)
def test_kasa_leaves_the_base():
    params, net, adapter = ours(fp.KaSA(r=3, target_modules=["0"]))
    merged, _ = net.merge(params, adapter)
    torch.testing.assert_close(net.unmerge(merged, adapter)["0.weight"], base()[0].weight.detach())
    assert torch.equal(params["0.weight"], base()[0].weight)
    wrapped = theirs(kasa_config=peft.KasaConfig())
    with wrapped.disable_adapter():
        assert not torch.allclose(wrapped(X), base()(X), atol=1e-3)
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    assert not torch.allclose(layer_of(wrapped).base_layer.weight, base()[0].weight, atol=1e-3)


@differs(
    "BDLoRA",
    "`get_delta_weight` of a blocked layer multiplies the stored factor as it is, of another shape",
    "the update is that of the block-diagonal factor",
)
def test_the_update_of_blocks():
    config = {"target_modules_bd_a": ["0"], "nblocks": 2}
    params, net, adapter = ours(fp.BDLoRA(r=4, lora_alpha=6, target_modules=["0"], use_bdlora=config))
    a, b = (adapter.params["0"][n] for n in "AB")
    want = params["0.weight"] + 1.5 * torch.cat([b[0], b[1]], 1) @ torch.block_diag(a[0], a[1])
    torch.testing.assert_close(net.merge(params, adapter)[0]["0.weight"], want)
    layer = layer_of(theirs(use_bdlora=peft.BdLoraConfig(**config)))
    assert layer.get_delta_weight("default").shape != (8, 12)


@differs(
    "QALoRA", "only applied to GPTQ layers, and silently plain LoRA elsewhere; it cannot be merged", "on every base; merges"
)
def test_qalora_works_on_every_base():
    params, net, adapter = ours(fp.QALoRA(r=4, lora_alpha=6, target_modules=["0"], qalora_group_size=3))
    a, b = (adapter.params["0"][n] for n in "AB")
    pooled = X.reshape(5, 4, 3).mean(2) * 4
    want = X @ params["0.weight"].T + params["0.bias"] + 1.5 * pooled @ a.T @ b.T
    torch.testing.assert_close(net(params, adapter, X), want)
    merged, _ = net.merge(params, adapter)
    torch.testing.assert_close(net.model(merged, X), want)
    update = (merged["0.weight"] - params["0.weight"]).unflatten(1, (4, 3))
    torch.testing.assert_close(update, update[..., :1].expand_as(update))  # constant along groups
    layer = layer_of(theirs(use_qalora=True, qalora_group_size=3))
    assert layer.lora_A["default"].weight.shape == (4, 12)


@differs(
    "VeLoRA",
    "every training call of `batch_average` overwrites a buffer, also without an optimizer step",
    "the direction is of the call's batch and is kept nowhere",
)
def test_velora_has_no_hidden_state():
    params, net, adapter = ours(fp.VeLoRA(r=4, target_modules=["0"], velora_config={"num_groups": 3}))
    before = adapter.leaves("0")["e"].clone()
    net(params, adapter, X, context=TRAINING)
    assert torch.equal(adapter.leaves("0")["e"], before)
    wrapped = theirs(velora_config=peft.VeloraConfig(num_groups=3)).train()
    kept = layer_of(wrapped).lora_velora_embed["default"].clone()
    wrapped(X)
    assert not torch.equal(layer_of(wrapped).lora_velora_embed["default"], kept)


@differs(
    "VeLoRA",
    "after a file is read `batch_average_once` finds the direction again, from the next batch",
    "the direction in the file stays",
)
def test_velora_keeps_the_direction_of_a_file(tmp_path):
    config = {"num_groups": 3, "init_type": "batch_average_once"}
    wrapped = theirs(velora_config=peft.VeloraConfig(**config), init_lora_weights=False).train()
    wrapped(X)
    found = layer_of(wrapped).lora_velora_embed["default"].clone()
    wrapped.save_pretrained(tmp_path)
    model, params = fp.functionalize(base())
    net, adapter = fp.load_peft(model, params, tmp_path)
    leaves = adapter.leaves("0")
    assert torch.equal(leaves["e"], found)
    other = X[:2]
    got = torch.func.grad(lambda p: net(params, adapter.replace(params=p), other, context=TRAINING).sum())(adapter.params)
    seen = ((other.reshape(2, 3, 4) @ found)[..., None] * found).reshape(2, 12)
    torch.testing.assert_close(got["0"]["A"], (1.5 * torch.ones(2, 8) @ leaves["B"]).T @ seen)
    back = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).train()
    back(other)
    assert not torch.allclose(layer_of(back).lora_velora_embed["default"], found, atol=1e-3)


def sampler_of(**config):
    layer = layer_of(theirs(monteclora_config=peft.MontecloraConfig(buffer_size=2, **config)).train())
    return layer.lora_monteclora_sampler["default"]


@differs(
    "MonteCLoRA",
    "the divergence of the Dirichlet weights has the wrong sign of a term; it is negative at the start",
    "that of `torch.distributions`",
)
def test_pefts_dirichlet_divergence_is_none():
    sampler = sampler_of(num_samples=3, dirichlet_prior=0.7)
    alpha, prior = torch.tensor([2.0, 0.3, 1.1]), torch.full((3,), 0.7)
    want = torch.distributions.kl_divergence(torch.distributions.Dirichlet(alpha), torch.distributions.Dirichlet(prior))
    method = fp.MonteCLoRA(monteclora_config={"num_samples": 3, "dirichlet_prior": 0.7})
    torch.testing.assert_close(method.of_dirichlet({"omega": alpha.log()}), want)
    assert abs(float(sampler.dirichlet_kl(alpha) - want)) > 0.1
    assert float(sampler.dirichlet_kl(torch.full((3,), 1.5))) < 0


@differs(
    "MonteCLoRA",
    "with some 20 samples or more the variational loss overflows, since it takes exponentials of log-gamma",
    "it is finite",
)
def test_the_variational_loss_of_many_samples_is_finite():
    assert not torch.isfinite(sampler_of(num_samples=32).get_variational_loss()[0])
    method = fp.MonteCLoRA(r=4, target_modules=["0"], monteclora_config={"num_samples": 32})
    _, net, adapter = ours(method)
    omega = adapter.leaves("0")["omega"]
    want = torch.distributions.kl_divergence(
        torch.distributions.Dirichlet(omega.exp()), torch.distributions.Dirichlet(torch.full((32,), 0.1))
    )
    torch.testing.assert_close(method.of_dirichlet({"omega": omega}), want)
    assert torch.isfinite(net.penalty(adapter, TRAINING))


@differs(
    "MonteCLoRA",
    "the draws of a training call depend on how many came before, whatever the seed, and are not saved",
    "they depend on the seed of the call",
)
def test_draws_of_a_call_are_of_its_seed():
    params, net, adapter = ours(fp.MonteCLoRA(r=4, target_modules=["0"], monteclora_config={"sample_scaler": 1.0}))
    once, again = (net(params, adapter, X, context=TRAINING) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.allclose(once, net(params, adapter, X), atol=1e-3)
    wrapped = theirs(monteclora_config=peft.MontecloraConfig(sample_scaler=1.0), init_lora_weights=False).train()

    def seeded():
        torch.manual_seed(0)
        return wrapped(X)

    assert not torch.allclose(seeded(), seeded(), atol=1e-3)
