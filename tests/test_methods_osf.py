"""OSF: projected gradients against peft's hooks, what is preserved, ranks and targets."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import nn

import funcpeft as fp
from funcpeft.tree import tree_map

SHAPES = {"wide": (12, 6), "tall": (6, 12), "square": (8, 8)}


class Layer(nn.Module):
    def __init__(self, in_=6, out=12):
        super().__init__()
        self.lin = nn.Linear(in_, out)

    def forward(self, x):
        return self.lin(x)


def base(name="wide"):
    torch.manual_seed(0)
    return Layer(*SHAPES[name])


def theirs(name="wide", **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base(name), peft.OSFConfig(target_modules=["lin"], effective_rank=3, **fields))


def ours(name="wide"):
    model, params = fp.functionalize(base(name))
    net = fp.adapt(model, fp.OSF(target_modules=["lin"], effective_rank=3))
    adapter = net.init(params, 0)
    gen = torch.Generator().manual_seed(1)
    moved = tree_map(lambda t: t + 0.1 * torch.randn(t.shape, generator=gen), adapter.params)
    return model, params, net, adapter.replace(params=moved)


@pytest.mark.parametrize("name", SHAPES)
def test_projected_gradients_are_those_of_pefts_hooks(name):
    _, params, net, adapter = ours(name)
    x = torch.randn(5, SHAPES[name][0], generator=torch.Generator().manual_seed(2))
    wrapped = theirs(name)
    trained = {n.rsplit("_", 1)[0][-1]: p for n, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, p in trained.items():
            p.copy_(adapter.params["lin"][key])
    wrapped(x).square().sum().backward()
    _, grads = fp.value_and_grad(lambda a: net(params, a, x).square().sum())(adapter)
    got = net.project_grads(params, grads, adapter)
    for key, p in trained.items():
        torch.testing.assert_close(got["lin"][key], p.grad, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(got["lin"]["U"], grads["lin"]["U"], atol=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_preserved_gets_no_gradient(name):
    _, params, net, adapter = ours(name)
    x = torch.randn(5, SHAPES[name][0], generator=torch.Generator().manual_seed(2))
    _, grads = fp.value_and_grad(lambda a: net(params, a, x).square().sum())(adapter)
    got = net.project_grads(params, grads, adapter)["lin"]
    u, _, vh = torch.linalg.svd(params["lin.weight"])
    scale = float(grads["lin"]["U"].abs().max() + grads["lin"]["V"].abs().max())
    assert float((u[:, :3].T @ got["U"]).abs().max()) < 1e-5 * scale
    assert float((got["V"] @ vh[:3].T).abs().max()) < 1e-5 * scale


def test_gradients_to_project_must_be_those_of_the_adapter():
    model, params = fp.functionalize(base())
    net = fp.adapt(model, fp.OSF(effective_rank=3))
    adapter = net.init(params, 0)
    for odd in ({"sight": adapter.params["lin"]}, {"lin": {"U": adapter.params["lin"]["U"]}}, 3):
        with pytest.raises(TypeError, match=r"grads: .*adapter\.params"):
            net.project_grads(params, odd, adapter)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "2"])
def test_ranks_are_checked(rank):
    with pytest.raises(ValueError, match="effective_rank must be None, a positive integer or a fraction"):
        fp.OSF(rank_pattern={"lin": rank})
    with pytest.raises(ValueError, match="effective_rank must be"):
        fp.OSF(effective_rank=rank)


def test_some_direction_must_be_preserved():
    model, _ = fp.functionalize(base())
    with pytest.raises(ValueError, match="osf at 'lin': effective_rank must preserve one direction or more of 6, got 0"):
        fp.adapt(model, fp.OSF(target_modules=["lin"], effective_rank=0.1))
    config = peft.OSFConfig(target_modules=["lin"], effective_rank=0.1)
    with pytest.raises(ValueError, match="effective_rank"):
        peft.get_peft_model(base(), config)


def test_the_whole_rank_may_be_preserved(tmp_path):
    model, params = fp.functionalize(base())
    net = fp.adapt(model, fp.OSF(target_modules=["lin"], effective_rank=1.0))
    adapter = net.init(params, 0)
    assert adapter.params["lin"]["S"].shape == (0,)
    x = torch.randn(3, 12)
    assert torch.equal(net(params, adapter, x), model(params, x))


def test_projection_needs_no_base_and_maps_over_members(monkeypatch):
    _, params, net, one = ours("wide")
    members = [one, net.init(params, 1)]
    gen = torch.Generator().manual_seed(4)
    grads = [tree_map(lambda t: torch.randn(t.shape, generator=gen), a.params) for a in members]
    want = [net.project_grads(params, g, a)["lin"] for g, a in zip(grads, members, strict=True)]
    many, given = fp.stack(members), {"lin": {n: torch.stack([g["lin"][n] for g in grads]) for n in ("U", "S", "V")}}
    nothing = tree_map(lambda t: t * torch.nan, params)
    got = torch.func.vmap(lambda g, a: net.project_grads(nothing, g, a))(given, many)["lin"]
    for i, leaves in enumerate(want):
        for name, t in leaves.items():
            torch.testing.assert_close(got[name][i], t)


def test_without_targets_every_linear_layer_is_adapted():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.a, self.b = nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 4)

    net = fp.adapt(fp.functionalize(Tower())[0], fp.OSF())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(Tower(), peft.OSFConfig())
    assert set(net.entries[0].sites) == set(wrapped.targeted_module_names) == {"a", "b"}


def test_an_architecture_has_its_own_targets():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    sites = fp.adapt(fp.functionalize(LlamaForCausalLM(LlamaConfig(**sizes)))[0], fp.OSF()).entries[0].sites
    assert "model.layers.0.mlp.gate_proj" in sites
    assert "lm_head" not in sites
