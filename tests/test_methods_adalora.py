"""AdaLoRA's allocator against peft's over a whole schedule, its regulariser, pruned files, and what peft does otherwise."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from differences import differs
from safetensors.torch import load_file
from torch import nn

import funcpeft as fp
from funcpeft.tree import tree_map


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.lin1(torch.tanh(self.lin0(x)))


def base():
    torch.manual_seed(0)
    return Mlp().double()


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).double()
FIELDS = {
    "init_r": 4,
    "target_r": 2,
    "tinit": 1,
    "tfinal": 2,
    "deltaT": 2,
    "total_step": 11,
    "lora_alpha": 3,
    "target_modules": ["lin0", "lin1"],
}


def theirs(**fields):
    module = base()
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(module, peft.AdaLoraConfig(**{**FIELDS, **fields}))


def ours(**fields):
    model, params = fp.functionalize(base())
    net = fp.adapt(model, fp.AdaLoRA(**{**FIELDS, **fields}))
    return model, params, net, fp.peft_init(net, params, 5)


def trained(wrapped, steps=11):
    """Trains peft's model by plain gradient steps, yielding it after every allocation."""
    parameters = [p for n, p in wrapped.named_parameters() if p.requires_grad and "ranknum" not in n]
    for step in range(steps):
        wrapped.zero_grad()
        wrapped.base_model.model(X).square().mean().backward()
        with torch.no_grad():
            for p in parameters:
                p.sub_(0.5 * p.grad)
        wrapped.base_model.update_and_allocate(step)
        yield step


def steps(net, params, adapter, count=11):
    """Trains by the same steps, yielding adapter and state."""
    method = net.methods[0]
    state = method.allocate_init(adapter)
    for _ in range(count):
        grads = torch.func.grad(lambda p: net(params, adapter.replace(params=p), X).square().mean())(adapter.params)  # noqa: B023
        adapter = adapter.replace(params=tree_map(lambda p, g: p - 0.5 * g, adapter.params, grads))
        adapter, state = method.allocate_update(grads, state, adapter)
        yield adapter, state


@pytest.mark.parametrize("fields", [{}, {"deltaT": 1, "tinit": 0}, {"tfinal": 0}, {"target_r": 1, "tinit": 3}], ids=str)
def test_the_allocator_is_pefts_over_a_whole_schedule(fields):
    wrapped = theirs(**fields)
    _, params, net, adapter = ours(**fields)
    masked = 0
    for _, (mine, _) in zip(trained(wrapped), steps(net, params, adapter), strict=True):
        for path, leaves in mine.params.items():
            layer = wrapped.base_model.model.get_submodule(path)
            for name in ("A", "B", "E"):
                want = getattr(layer, f"lora_{name}")["default"]
                torch.testing.assert_close(leaves[name], want.detach(), rtol=1e-10, atol=1e-12)
        masked += sum(int((v["E"] == 0).sum()) for v in mine.params.values())
    assert masked > 0


def test_a_pruned_adapter_computes_the_same_and_its_file_is_pefts(tmp_path):
    wrapped = theirs()
    for _ in trained(wrapped):
        pass
    model, params, net, adapter = ours()
    *_, (adapter, state) = steps(net, params, adapter)
    method, small = net.methods[0].pruned(adapter, state)
    smaller = fp.adapt(model, method)
    assert sum(len(v["E"]) for v in small.params.values()) == 4
    torch.testing.assert_close(smaller(params, small, X), net(params, adapter, X))
    fp.save_peft(smaller, small, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path / "theirs")
        back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    wrote, read = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert wrote.keys() == read.keys()
    for key, t in read.items():
        torch.testing.assert_close(wrote[key], t, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(back.base_model.model(X), net(params, adapter, X))
    again, loaded = fp.load_peft(model, params, tmp_path / "theirs")
    torch.testing.assert_close(again(params, loaded, X), net(params, adapter, X))


def test_a_site_may_be_left_without_a_triplet(tmp_path):
    model, params, net, adapter = ours()
    state = net.methods[0].allocate_init(adapter)
    state["kept"] = {"lin0": torch.zeros(4, dtype=torch.bool), "lin1": state["kept"]["lin1"]}
    method, small = net.methods[0].pruned(adapter, state)
    smaller = fp.adapt(model, method)
    fp.save_peft(smaller, small, tmp_path)
    again, loaded = fp.load_peft(model, params, tmp_path)
    assert loaded.params["lin0"]["A"].shape == (0, 12)
    assert torch.equal(again(params, loaded, X), smaller(params, small, X))


def test_the_regulariser_is_that_of_the_paper():
    _, params, net, adapter = ours(orth_reg_weight=0.25)
    wrapped = theirs(orth_reg_weight=0.25)
    total = []
    for n, p in wrapped.named_parameters():
        if "lora_A" in n or "lora_B" in n:
            gram = p @ p.T if "lora_A" in n else p.T @ p
            total.append(torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype)))
    torch.testing.assert_close(net.penalty(adapter), 0.25 * torch.stack(total).mean().detach())
    assert torch.autograd.gradcheck(
        lambda a: net.penalty(adapter.replace(params={**adapter.params, "lin0": {**adapter.params["lin0"], "A": a}})),
        adapter.params["lin0"]["A"].clone().requires_grad_(),
    )
    assert torch.equal(net(params, adapter, X), net(params, adapter, X))  # and is part of no output


def test_the_allocator_vmaps_over_members():
    _, params, net, _ = ours()
    method = net.methods[0]
    ads = [net.init(params, s) for s in range(3)]

    def run(adapter):
        state = method.allocate_init(adapter)
        for _ in range(5):
            grads = torch.func.grad(lambda p: net(params, adapter.replace(params=p), X).square().mean())(adapter.params)  # noqa: B023
            adapter = adapter.replace(params=tree_map(lambda p, g: p - 0.5 * g, adapter.params, grads))
            adapter, state = method.allocate_update(grads, state, adapter)
        return adapter.params

    together = torch.func.vmap(run)(fp.stack(ads))
    for i, one in enumerate(ads):
        for path, leaves in run(one).items():
            for name, t in leaves.items():
                torch.testing.assert_close(together[path][name][i], t)


def test_the_allocator_keeps_everything_where_the_target_is_the_start():
    _, params, net, adapter = ours(target_r=4)
    *_, (adapter, state) = steps(net, params, adapter)
    assert all(bool(k.all()) for k in state["kept"].values())


@differs("AdaLoRA", "`target_r` equal to `init_r`: an error in the first allocation", "nothing is dropped")
def test_peft_cannot_keep_every_rank():
    wrapped = theirs(target_r=4)
    with pytest.raises(RuntimeError, match="k"):
        list(trained(wrapped))


@differs(
    "AdaLoRA",
    "the divisor `ranknum` has a gradient and is trained with the rest, but no file holds it: a reloaded adapter differs",
    "it is a constant, `init_r`",
)
def test_peft_trains_the_number_of_ranks(tmp_path):
    wrapped = theirs(init_lora_weights=False)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    wrapped.base_model.model(X).square().mean().backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path)
        back = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert float((back.base_model.model(X) - wrapped.base_model.model(X)).detach().abs().max()) > 1e-3
    _, params, net, adapter = ours(init_lora_weights=False)
    fp.save_peft(net, adapter, tmp_path / "ours")
    again, loaded = fp.load_peft(net.model, params, tmp_path / "ours")
    assert torch.equal(again(params, loaded, X), net(params, adapter, X))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"total_step": None}, "total_step must be a positive integer, got None"),
        ({"tinit": 9}, "tinit must be before total_step - tfinal = 9, got 9"),
        ({"beta1": 1.0}, r"beta1 must be in \(0, 1\), got 1.0"),
        ({"orth_reg_weight": -1}, "orth_reg_weight must be non-negative"),
        ({"target_r": 5}, "target_r must be at most init_r = 4, got 5"),
        ({"tfinal": -1}, "tinit must be non-negative, as tfinal"),
    ],
)
def test_fields_are_checked(fields, text):
    with pytest.raises(ValueError, match=text):
        fp.AdaLoRA(**{**FIELDS, **fields})


def test_a_grouped_convolution_is_refused():
    model, _ = fp.functionalize(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))
    with pytest.raises(ValueError, match="a convolution must have one group"):
        fp.adapt(model, fp.AdaLoRA(**{**FIELDS, "target_modules": ["0"]}))
