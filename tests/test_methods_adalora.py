"""AdaLoRA: its allocator against peft's over whole schedules, its regulariser, and pruned adapters in files and stacks."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
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


@pytest.mark.parametrize(
    ("init_r", "target_r", "tinit", "tfinal", "total_step"),
    [(12, 8, 0, 0, 100), (12, 4, 200, 500, 3000), (64, 1, 0, 0, 81), (9, 3, 0, 3, 30), (8, 7, 0, 0, 8)],
)
def test_the_budget_is_pefts_at_every_step(init_r, target_r, tinit, tfinal, total_step):
    fields = {"init_r": init_r, "target_r": target_r, "tinit": tinit, "tfinal": tfinal, "total_step": total_step}
    method = fp.AdaLoRA(**fields)
    allocator = theirs(**fields).base_model.rankallocator
    for sites in (1, 7, 24):
        allocator.init_bgt, allocator.target_bgt = init_r * sites, target_r * sites
        wanted = [allocator.budget_schedule(step)[0] for step in range(total_step + 2)]
        assert method.budget(torch.arange(total_step + 2), sites).tolist() == wanted
    assert int(method.budget(total_step, 3)) == 3 * target_r


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


def test_gradients_and_states_of_other_adapters_and_stacks_are_refused():
    *_, net, adapter = ours()
    method, state = net.methods[0], net.methods[0].allocate_init(adapter)
    short = {"lin0": adapter.params["lin0"]}
    with pytest.raises(TypeError, match="grads: paths, leaves and shapes must be those of adapter"):
        method.allocate_update(short, state, adapter)
    with pytest.raises(TypeError, match="the allocator's state: paths, leaves and shapes must be those of adapter"):
        method.allocate_update(adapter.params, {**state, "mean": short}, adapter)
    stacked = fp.stack([adapter, adapter])
    with pytest.raises(ValueError, match=r"adalora: members are pruned apart.*a stack at 'lin0', 'lin1'; unstack"):
        method.pruned(stacked, torch.func.vmap(method.allocate_init)(stacked))


def test_the_allocator_takes_an_adapter_without_triplets():
    model, params, net, adapter = ours()
    method, small = pruned_to(net, adapter, lin0=[0, 0, 0, 0], lin1=[0, 0, 0, 0])
    after, _ = method.allocate_update(small.params, method.allocate_init(small), small)
    assert after.params["lin0"]["A"].shape == (0, 12)
    torch.testing.assert_close(fp.adapt(model, method)(params, after, X), model(params, X))


def pruned_to(net, adapter, **kept):
    """Returns method and adapter without the triplets that are not kept at the sites named."""
    state = net.methods[0].allocate_init(adapter)
    state["kept"] |= {path: torch.tensor(k, dtype=torch.bool) for path, k in kept.items()}
    return net.methods[0].pruned(adapter, state)


def test_the_pattern_of_a_file_follows_the_leaves(tmp_path):
    model, params, net, adapter = ours(init_lora_weights=False)
    _, small = pruned_to(net, adapter, lin1=[0, 1, 0, 1])
    fp.save_peft(net, small, tmp_path)  # the net's method still says that nothing was dropped
    again, loaded = fp.load_peft(model, params, tmp_path)
    assert again.methods[0].rank_pattern["lin1.lora_E"] == (True, True, False, False)
    torch.testing.assert_close(again(params, loaded, X), net(params, small, X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(back.base_model.model(X), net(params, small, X))


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)), (nn.Embedding(7, 4), torch.arange(6).reshape(2, 3))],
    ids=["conv", "embedding"],
)
def test_other_layers_may_be_left_without_a_triplet_too(layer, x):
    model, params = fp.functionalize(nn.Sequential(layer))
    net = fp.adapt(model, fp.AdaLoRA(**{**FIELDS, "target_modules": ["0"]}, init_lora_weights=False))
    adapter = net.init(params, 0)
    assert not torch.equal(net(params, adapter, x), model(params, x))
    method, small = pruned_to(net, adapter, **{"0": [0, 0, 0, 0]})
    assert torch.equal(fp.adapt(model, method)(params, small, x), model(params, x))


def test_padded_ranks_of_a_stack_change_no_regulariser():
    _, _, net, adapter = ours()
    members = [adapter, pruned_to(net, adapter, lin0=[1, 0, 0, 1])[1], pruned_to(net, adapter, lin1=[0, 0, 0, 0])[1]]
    together = torch.func.vmap(net.penalty)(fp.stack(members))
    torch.testing.assert_close(together, torch.stack([net.penalty(one) for one in members]))


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


def test_the_allocator_stays_where_the_adapter_is():
    _, _, net, adapter = ours()
    there = adapter.replace(params=tree_map(lambda t: t.to("meta"), adapter.params))
    _, state = net.methods[0].allocate_update(there.params, net.methods[0].allocate_init(there), there)
    assert {t.device.type for t in (state["step"], *state["kept"].values())} == {"meta"}


def test_the_allocator_keeps_everything_where_the_target_is_the_start():
    _, params, net, adapter = ours(target_r=4)
    *_, (adapter, state) = steps(net, params, adapter)
    assert all(bool(k.all()) for k in state["kept"].values())


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


@pytest.mark.parametrize(
    "pattern", [{"lin0": [True] * 4}, {"lin0.lora_E": [True]}, {"lin0.lora_E": [1, 1, 0, 0]}, {"lin0.lora_E": 4}]
)
def test_a_rank_pattern_is_one_boolean_per_triplet(pattern):
    with pytest.raises(ValueError, match=r"adalora: rank_pattern\['lin0.*a list of init_r = 4 booleans, under a path with"):
        fp.AdaLoRA(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2, rank_pattern=pattern)
