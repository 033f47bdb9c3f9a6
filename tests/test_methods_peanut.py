"""PEANuT: activations, the transposed layer of every kind of weight, and refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from funcpeft import errors
from funcpeft.adapt import adapt
from funcpeft.functional import functionalize
from funcpeft.methods import LoRA, PEANuT
from funcpeft.methods.peanut import ACTIVATIONS
from funcpeft.quant import NF4
from funcpeft.quantization import dequantize, quantize
from funcpeft.tree import tree_map
from funcpeft.weights import Adapted, Base


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(adapter, seed=7):
    gen = torch.Generator().manual_seed(seed)

    def move(t):
        return t + 0.3 * torch.randn(t.shape, generator=gen, dtype=t.dtype)

    return adapter.replace(params=tree_map(move, adapter.params))


def test_activations_are_those_of_transformers():
    h = torch.linspace(-11, 11, 301)
    for name, act in ACTIVATIONS.items():
        want = ACT2FN[name](h.clamp(min=0) if name == "sqrtsoftplus" else h)
        torch.testing.assert_close(act(h.clamp(min=0) if name == "sqrtsoftplus" else h), want, rtol=1e-5, atol=1e-5)
    assert set(ACT2FN) - set(ACTIVATIONS) == {"prelu", "xielu"}  # which have parameters


def test_the_update_of_two_encoders_by_hand():
    torch.manual_seed(0)
    model, params = functionalize(nn.Sequential(nn.Linear(5, 4).double()))
    net = adapt(model, PEANuT(r=3, depth=2, act_fn="tanh", scaling=0.5, target_modules=["0"]))
    adapter, x = moved(net.init(params, 0)), randn(6, 5)
    p, w = adapter.params["0"], params["0.weight"]
    first = torch.tanh(w.T @ p["A"].T)
    second = torch.tanh(first @ p["E"][0].T)
    third = torch.tanh(second @ p["E"][1].T)
    third = torch.tanh(third @ p["F"][0].T) + second
    third = torch.tanh(third @ p["F"][1].T) + first
    want = F.linear(x, w + 0.5 * (third @ p["B"].T).T, params["0.bias"])
    torch.testing.assert_close(net(params, adapter, x), want)


@pytest.mark.parametrize("grad", [False, True])
def test_a_stored_base_is_met_and_gives_the_same_as_its_dense_weight(grad):
    torch.manual_seed(0)
    model, params = functionalize(nn.Sequential(nn.Linear(64, 64).double()))
    stored = quantize(model, params, NF4(), target_modules=["0"])
    net = adapt(model, PEANuT(r=3, depth=1, act_fn="gelu", target_modules=["0"]))
    adapter, x = moved(net.init(stored, 0)), randn(6, 64)

    def run(params):
        if not grad:
            return net(params, adapter, x)
        return torch.func.grad(lambda p: net(params, adapter.replace(params=p), x).square().sum())(adapter.params)

    got, want = run(stored), run(dequantize(stored))
    tree_map(lambda a, b: torch.testing.assert_close(a, b), {"": got}, {"": want})


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Linear(6, 4, bias=False)])
def test_the_transposed_layer_is_the_derivative_by_the_input(make):
    torch.manual_seed(0)
    model, params = functionalize(nn.Sequential(make().double()))
    site, y = model.site("0.weight"), randn(3, 4)
    lora = adapt(model, LoRA(r=2, target_modules=["0"]))
    inner = lora.attach(params, moved(lora.init(params, 0)))["0.weight"]
    assert isinstance(inner, Adapted)
    for weight in (params["0.weight"], inner):
        base = Base(site, weight, params.get("0.bias"))
        x = randn(3, 6, seed=2)
        want = torch.func.vjp(base, x)[1](y)[0]
        torch.testing.assert_close(base.adjoint(y), want)
        torch.testing.assert_close(base.adjoint(y), y @ base.weight)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"depth": -1}, "depth must be from 0 to 1000, got -1"),
        ({"depth": True}, "depth must be an integer, got True"),
        ({"act_fn": "prelu"}, "act_fn must be one of 'gelu', 'gelu_10'.*got 'prelu'"),
    ],
)
def test_refusals(fields, text):
    with pytest.raises(ValueError, match=text):
        PEANuT(**fields)


def test_merging_does_not_invert():
    model, params = functionalize(nn.Sequential(nn.Linear(5, 4)))
    net = adapt(model, PEANuT(r=2, target_modules=["0"]))
    with pytest.raises(errors.NoMergedFormError, match="peanut at '0': merging does not invert"):
        net.unmerge(params, net.init(params, 0))
