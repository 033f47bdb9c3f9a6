"""SHiRA: masks of one's own, both ways with peft's files; and transformers' transposed layer for the methods of one matrix."""

import dataclasses
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import funcpeft as fp
from funcpeft.tree import tree_map

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch, about peft's sparse update


class Site(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.site = layer

    def forward(self, x):
        return self.site(x)


def single(make=lambda: nn.Linear(6, 8)):
    torch.manual_seed(4)
    return Site(make()).double().eval()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(adapter):
    gen = torch.Generator().manual_seed(7)
    return adapter.replace(
        params=tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=gen, dtype=t.dtype), adapter.params)
    )


def by_magnitude(base_layer, r, **kwargs):
    """Chooses the largest entries, as a mask function of peft."""
    w = base_layer.weight.detach()
    mask = torch.zeros(w.numel(), dtype=torch.float32)
    mask[w.abs().flatten().topk(r * sum(w.shape)).indices] = 1
    return mask.view(w.shape)


def theirs():
    config = peft.ShiraConfig(r=1, mask_type="magnitude", target_modules=["site"])
    config.mask_fn = by_magnitude
    return config


def test_a_file_with_a_mask_of_ones_own_is_read(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(single(), theirs()).eval()
    weight = next(p for n, p in wrapped.named_parameters() if "shira_weight" in n)
    with torch.no_grad():
        weight.add_(randn(*weight.shape))
    wrapped.save_pretrained(tmp_path)
    model, params = fp.functionalize(single())
    net, adapter = fp.load_peft(model, params, tmp_path)
    assert net.methods[0].mask_type == "magnitude"
    x = randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(net(params, adapter, x), wrapped(x))


def test_a_mask_of_ones_own_is_written_so_that_peft_reads_it(tmp_path):
    model, params = fp.functionalize(single())
    net = fp.adapt(model, fp.SHiRA(r=1, mask_type="magnitude", target_modules=["site"]))
    mask = by_magnitude(single().site, 1) > 0
    adapter = moved(net.init(params, 0, masks={"site": mask}))
    fp.save_peft(net, adapter, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.get_peft_model(single(), theirs()).eval()
        back.load_adapter(tmp_path, "read", peft_config=theirs())
        back.set_adapter("read")
    x = randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(net(params, adapter, x), back(x))
        torch.testing.assert_close((net.merge(params, adapter)[0]["site.weight"] - params["site.weight"] != 0), mask)


@pytest.mark.parametrize(
    "method",
    [
        fp.LoHa(r=2),
        fp.LoKr(r=1),
        fp.LoKr(r=8, decompose_both=True),
        fp.MiSS(r=4),
        fp.MiSS(r=2, init_weights="bat"),
        fp.MiSS(r=4, init_weights="mini", mini_r=2),
        fp.SHiRA(r=1),
        fp.PEANuT(r=2, act_fn="gelu"),
        fp.Lily(r=2),
    ],
    ids=repr,
)
def test_a_transposed_layer_is_the_same_matrix(method):
    plain, turned = single(), single(lambda: Conv1D(8, 6))
    with torch.no_grad():
        turned.site.weight.copy_(plain.site.weight.T)
        turned.site.bias.copy_(plain.site.bias)
    method, x = dataclasses.replace(method, target_modules=["site"]), randn(3, 6)
    (model, params), (other, flipped) = fp.functionalize(plain), fp.functionalize(turned)
    net, twin = fp.adapt(model, method), fp.adapt(other, method)
    adapter = moved(net.init(params, 0))
    torch.testing.assert_close(twin(flipped, adapter, x), net(params, adapter, x))
    assert float((net(params, adapter, x) - model(params, x)).abs().max()) > 1e-3
    if method.merges:
        merged, again = net.merge(params, adapter)[0], twin.merge(flipped, adapter)[0]
        torch.testing.assert_close(merged["site.weight"].T, again["site.weight"])
