"""Modules that read adapted parameters by themselves run whole for each member: values, rows elsewhere, loops, refusals."""

import pytest
import torch
import zoo
from herds import agree, at, each, population
from torch import nn

import funcpeft as fp
from funcpeft.fold import Folded, Layout


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("target", ["in_proj_weight", "out_proj.weight", "both"])
def test_attention_of_torch(batch_first, target):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.lin = nn.MultiheadAttention(8, 2, batch_first=batch_first), nn.Linear(8, 3)

        def forward(self, x):
            return self.lin(self.attn(x, x, x)[0])

    names = {"in_proj_weight": [], "out_proj.weight": ["out_proj"], "both": ["out_proj"]}[target]
    raw = ("attn.in_proj_weight",) if target != "out_proj.weight" else ()
    p = population(Net().double(), fp.LoRA(r=2, target_modules=[*names, "lin"], target_parameters=raw))
    rows = 0 if batch_first else 1
    x = zoo.noise(3, *((2, 5) if batch_first else (5, 2)), 8).double()
    out = fp.apply_many(p.net, p.params, p.many, x, batch_dims=rows, strategy="fold")
    for i, want in enumerate(each(p, x)):
        agree(out[i], want)
    x, index = x.flatten(0, 1) if batch_first else x.permute(1, 0, 2, 3).flatten(1, 2), torch.tensor([2, -1, 0, 2, 1, 0])
    out = fp.apply_routed(p.net, p.params, p.many, index, x, batch_dims=rows)
    for r, m in enumerate(index.tolist()):
        one = x.narrow(rows, r, 1)
        agree(out.narrow(rows, r, 1), p.model(p.params, one) if m < 0 else p.net(p.params, p.ads[m], one))


@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_modules(batch_first):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.gru = nn.Linear(6, 4), nn.GRU(4, 4, batch_first=batch_first)

        def forward(self, x):
            return self.gru(self.lin(x))

    p, rows = population(Net().double()), 0 if batch_first else 1
    x = zoo.noise(3, *((2, 5) if batch_first else (5, 2)), 6).double()
    out = fp.apply_many(p.net, p.params, p.many, x, batch_dims=rows, strategy="fold")
    for i, want in enumerate(each(p, x)):
        agree(at(out, i), want)
    x, index = zoo.noise(4, 4, 6).double(), torch.tensor([1, -1, 1, 0])
    y, h = fp.apply_routed(p.net, p.params, p.many, index, x, batch_dims=rows)
    for r, m in enumerate(index.tolist()):
        one = x.narrow(rows, r, 1)
        want = p.model(p.params, one) if m < 0 else p.net(p.params, p.ads[m], one)
        agree((y.narrow(rows, r, 1), h[:, r : r + 1]), want)


@pytest.mark.parametrize("how", [{"strategy": "fold"}, {"strategy": "vmap"}, {"strategy": "loop"}], ids=str)
def test_fused_experts(how):
    p = population(
        zoo.model("mixtral"), fp.LoRA(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    )
    kw = {"input_ids": zoo.ids(2, 5), "use_cache": False}
    out = fp.apply_many(p.net, p.params, p.many, in_dims=None, **how, **kw).logits
    for i, a in enumerate(p.ads):
        agree(out[i], p.net(p.params, a, **kw).logits, 1e-5)


def test_a_unit_that_branches_on_values_is_looped():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return x @ self.weight if float(x.sum()) > 1e9 else x @ self.weight.T

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch, self.lin = Branch(), nn.Linear(6, 4)

        def forward(self, x):
            return self.lin(self.branch(x))

    p, x = (
        population(Net().double(), fp.LoRA(r=2, target_modules=["lin"], target_parameters=["branch.weight"])),
        zoo.noise(3, 2, 6).double(),
    )
    out = fp.apply_many(p.net, p.params, p.many, x, strategy="fold")
    agree(list(out), each(p, x))


def test_a_weight_that_others_read_needs_its_own_module():
    p = population(nn.ModuleDict({"lin": nn.Linear(6, 4)}).double())
    site, base = p.model.site("lin.weight"), p.params["lin.weight"]
    with pytest.raises(ValueError, match=r"the weight at 'lin': a module reads it, and it has no one value in a population"):
        Folded((base,), base, Layout(((2, 1),))).dense(site, None)
    with pytest.raises(
        ValueError, match=r"fold at 'lin': axis 0 of the input must hold the 2 rows of the population, got shape"
    ):
        Folded((base,), base, Layout(((2, 1),))).meet(site, None, zoo.noise(3, 6).double(), 0)
