"""OSF: projected gradients against peft's hooks, what is preserved, merging, and where peft differs."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from differences import differs
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


@differs("OSF", "unmerging is refused for a model, and a layer only warns and stays merged", "subtracts the update")
def test_unmerging_is_a_subtraction():
    _, params, net, adapter = ours()
    merged, _ = net.merge(params, adapter)
    torch.testing.assert_close(net.unmerge(merged, adapter)["lin.weight"], params["lin.weight"])
    wrapped = theirs()
    with pytest.raises(NotImplementedError):
        wrapped.base_model.unmerge_adapter()


@differs("OSF", "merging twice adds the update twice", "params are values: a second merge is asked for")
def test_peft_merges_again():
    _, params, net, adapter = ours()
    wrapped = theirs(init_weights=False)
    layer = wrapped.base_model.model.lin
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    once = layer.base_layer.weight.detach() - before
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight.detach() - before, 2 * once)
    assert torch.equal(net.merge(params, adapter)[0]["lin.weight"], net.merge(params, adapter)[0]["lin.weight"])


@differs("OSF", "targets that are not linear are skipped without a word", "`TypeError` that names the path")
def test_a_target_that_is_not_linear():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.emb = nn.Linear(4, 4), nn.Embedding(5, 4)

        def forward(self, ids):
            return self.lin(self.emb(ids))

    model, _ = fp.functionalize(Two())
    with pytest.raises(TypeError, match="osf at 'emb': a target must be one of the kinds"):
        fp.adapt(model, fp.OSF(target_modules=["lin", "emb"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(Two(), peft.OSFConfig(target_modules=["lin", "emb"], effective_rank=2))
    assert type(wrapped.base_model.model.emb) is nn.Embedding


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "2"])
def test_ranks_are_checked(rank):
    with pytest.raises(ValueError, match="effective_rank must be None, a positive integer or a fraction"):
        fp.OSF(effective_rank=rank)


def test_the_whole_rank_may_be_preserved(tmp_path):
    model, params = fp.functionalize(base())
    net = fp.adapt(model, fp.OSF(target_modules=["lin"], effective_rank=1.0))
    adapter = net.init(params, 0)
    assert adapter.params["lin"]["S"].shape == (0,)
    x = torch.randn(3, 12)
    assert torch.equal(net(params, adapter, x), model(params, x))
