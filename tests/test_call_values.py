"""Values of the call: what methods read from the context, alone, in populations, recomputed, and set by methods of the call."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo
from torch import nn

import funcpeft as fp
from funcpeft.method import Method


@dataclass(frozen=True, kw_only=True)
class Gated(Method):
    """Adds ``m`` times a gate per row that the call gives."""

    peft_type: ClassVar[str] = ""
    context_names: ClassVar[tuple[str, ...]] = ("gate",)
    depends: ClassVar[bool] = False

    def init_site(self, base, gen):
        return {"m": torch.randn(base.shape[-2], generator=gen)}, {}

    def apply(self, leaves, base, x, context):
        gate = context.value("gate")
        gate = gate.repeat_interleave(x.shape[0] // gate.shape[0], 0)
        return base(x) + leaves["m"] * gate.view(-1, *(1,) * (x.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class Counted(Gated):
    """Sets the gate itself: the number of ids above 5 in the row, found anew at every forward."""

    def wrap(self, leaves, call, kind, facts):
        def around(forward, **inputs):
            plain = forward(values={"gate": torch.zeros(len(inputs["input_ids"]), dtype=torch.float64)}, **inputs)
            gate = (inputs["input_ids"] > 5).double().mean(1) + 0 * plain.logits.mean()
            return forward(values={"gate": gate}, **inputs)

        return functools.partial(call, forwards=(around,))


def gated(method=None):
    torch.manual_seed(0)
    model, params = fp.functionalize(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4)).double())
    net = fp.adapt(model, method or Gated(target_modules=["0", "2"]))
    return model, params, net, [net.init(params, s) for s in range(3)]


def test_a_value_is_read_where_it_is_needed():
    model, params, net, (adapter, *_) = gated()
    x, gate = torch.randn(2, 6).double(), torch.tensor([0.0, 2.0], dtype=torch.float64)
    out = net(params, adapter, x, context=fp.Context(values={"gate": gate}))
    assert torch.equal(out[0], model(params, x)[0])
    assert not torch.allclose(out[1], model(params, x)[1])


def test_a_missing_unknown_or_odd_value_is_refused():
    _, params, net, (adapter, *_) = gated()
    x = torch.randn(2, 6).double()
    with pytest.raises(ValueError, match=r"the call needs the value 'gate', got none; pass context=Context\(values="):
        net(params, adapter, x)
    with pytest.raises(ValueError, match=r"values must be those that the net's methods read, \['gate'\].*did you mean 'gate'"):
        net(params, adapter, x, context=fp.Context(values={"gat": torch.ones(2)}))
    with pytest.raises(ValueError, match="values must be those"):
        fp.apply_many(net, params, fp.stack([adapter]), x[None], context=fp.Context(values={"gat": torch.ones(1, 2)}))
    with pytest.raises(TypeError, match="value 'gate' must be a tensor, got list"):
        fp.Context(values={"gate": [1.0]})


def test_something_that_no_init_takes_is_refused():
    _, params, net, _ = gated()
    with pytest.raises(TypeError, match="init of gated takes nothing beyond the base, got 'statistics'"):
        net.init(params, 0, statistics={})


@pytest.mark.parametrize("strategy", ["fold", "vmap", "loop"])
def test_values_are_mapped_as_inputs_are(strategy):
    _, params, net, ads = gated()
    many = fp.stack(ads)
    x, gates = torch.randn(3, 2, 6).double(), torch.randn(3, 2).double()
    got = fp.apply_many(net, params, many, x, strategy=strategy, context=fp.Context(values={"gate": gates}))
    for i, one in enumerate(ads):
        assert torch.allclose(got[i], net(params, one, x[i], context=fp.Context(values={"gate": gates[i]})))
    shared = fp.Context(values={"gate": gates[0]})
    dims = ((0,), {"context.gate": None})
    got = fp.apply_many(net, params, many, x, in_dims=dims, strategy=strategy, context=shared)
    for i, one in enumerate(ads):
        assert torch.allclose(got[i], net(params, one, x[i], context=shared))


@pytest.mark.parametrize("strategy", ["fold", "loop"])
def test_values_follow_their_rows_through_routing(strategy):
    model, params, net, ads = gated()
    x, gate = torch.randn(5, 6).double(), torch.randn(5).double()
    index = [2, -1, 0, 2, 1]
    got = fp.apply_routed(net, params, fp.stack(ads), index, x, strategy=strategy, context=fp.Context(values={"gate": gate}))
    for row, m in enumerate(index):
        one = x[row : row + 1]
        context = fp.Context(values={"gate": gate[row : row + 1]})
        want = net(params, ads[m], one, context=context) if m >= 0 else model(params, one)
        assert torch.allclose(got[row], want[0])


def test_values_vmap_compile_and_differentiate():
    _, params, net, (adapter, *_) = gated()
    x, gates = torch.randn(2, 6).double(), torch.randn(3, 2).double()

    def run(gate):
        return net(params, adapter, x, context=fp.Context(values={"gate": gate}))

    want = torch.stack([run(g) for g in gates])
    assert torch.allclose(torch.func.vmap(run)(gates), want)
    assert torch.allclose(torch.compile(run, fullgraph=True, backend="aot_eager")(gates[1]), want[1])
    assert torch.autograd.gradcheck(run, gates[0].requires_grad_())


@pytest.mark.parametrize("remat", [False, True])
def test_values_that_a_method_of_the_call_sets_are_recomputed_with(remat):
    module = copy.deepcopy(zoo.model("llama")).double()
    model, params = fp.functionalize(module, remat=remat)
    net = fp.adapt(model, Counted(target_modules=["q_proj"]))
    adapter = net.init(params, 0)
    ids = torch.randint(0, 30, (3, 7))

    def loss(a):
        return net(params, a, input_ids=ids, use_cache=False).logits.square().mean()

    plain = fp.functionalize(module)
    gate = (ids > 5).double().mean(1)
    net2 = fp.adapt(plain[0], Gated(target_modules=["q_proj"]))

    def told(a):
        out = net2(plain[1], a, input_ids=ids, use_cache=False, context=fp.Context(values={"gate": gate}))
        return out.logits.square().mean()

    (got, grads), (want, expected) = fp.value_and_grad(loss)(adapter), fp.value_and_grad(told)(adapter)
    assert torch.allclose(got, want)
    for path, leaves in expected.items():
        assert torch.allclose(grads[path]["m"], leaves["m"])


def test_a_function_runs_around_every_forward_of_generate():
    model, params = fp.functionalize(copy.deepcopy(zoo.model("llama")).double())
    net = fp.adapt(model, Counted(target_modules=["q_proj"]))
    adapter = net.init(params, 0)
    ids = torch.randint(6, 30, (2, 4))
    options = {"do_sample": False, "use_cache": False, "pad_token_id": 0}
    text = net.call("generate", params, adapter, input_ids=ids, max_new_tokens=4, **options)
    for _ in range(4):
        ids = torch.cat([ids, net(params, adapter, input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, ids)


def test_a_method_of_the_call_with_sites_folds():
    model, params = fp.functionalize(copy.deepcopy(zoo.model("llama")).double())
    net = fp.adapt(model, Counted(target_modules=["q_proj"]))
    ads = [net.init(params, s) for s in range(3)]
    ids = torch.randint(0, 30, (3, 2, 5))
    got = fp.apply_many(net, params, fp.stack(ads), input_ids=ids, use_cache=False, strategy="fold").logits
    for i, one in enumerate(ads):
        assert torch.allclose(got[i], net(params, one, input_ids=ids[i], use_cache=False).logits)
