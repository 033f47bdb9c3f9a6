"""Stacks of adapters: padding of unequal ranks, sharing of equal constants, refusals."""

import pytest
import torch
from torch import nn

from funcpeft.adapt import adapt
from funcpeft.functional import functionalize
from funcpeft.methods import IA3, DoRA, FourierFT, LoHa, LoRA, VeRA
from funcpeft.stacking import members, stack, unstack
from funcpeft.tree import Adapter, tree_leaves, tree_map


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 6, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.fixture
def functional():
    torch.manual_seed(2)
    return functionalize(Mlp().double())


def moved(adapter, seed):
    gen = torch.Generator().manual_seed(seed)

    def move(t):
        return t + 0.3 * torch.randn(t.shape, generator=gen, dtype=t.dtype)

    return adapter.replace(params=tree_map(move, adapter.params))


def made(functional, method, seed):
    model, params = functional
    return moved(adapt(model, method).init(params, seed), seed)


def equal(a, b):
    return all(
        torch.equal(s, t) and s.dtype == t.dtype and s.shape == t.shape
        for s, t in zip(tree_leaves(a), tree_leaves(b), strict=True)
    )


UNEQUAL = {
    "ranks": [LoRA(r=r, target_modules=["up", "down"]) for r in (1, 4, 2)],
    "scalings": [LoRA(r=2, lora_alpha=a, target_modules=["up", "down"]) for a in (1, 7, 2)],
    "patterns": [LoRA(r=3, rank_pattern={"up": r}, alpha_pattern={"down": r}, target_modules=["up", "down"]) for r in (1, 5)],
    "pissa": [LoRA(r=r, init_lora_weights="pissa", target_modules=["up", "down"]) for r in (1, 4)],
    "dora": [DoRA(r=r, target_modules=["up", "down"]) for r in (3, 1)],
    "loha": [LoHa(r=r, target_modules=["up", "down"]) for r in (3, 1)],
    "vera": [VeRA(r=r, target_modules=["up", "down"]) for r in (3, 5)],
}


@pytest.mark.parametrize("group", UNEQUAL.values(), ids=UNEQUAL)
def test_members_that_differ_compute_in_a_stack_what_they_compute_alone(functional, group):
    model, params = functional
    alone = [made(functional, m, seed) for seed, m in enumerate(group)]
    many, net, x = stack(alone), adapt(model, group[0]), torch.randn(3, 8, dtype=torch.float64)
    got = torch.func.vmap(lambda a: net(params, a, x))(many)
    for i, (one, method) in enumerate(zip(alone, group, strict=True)):
        torch.testing.assert_close(got[i], adapt(model, method)(params, one, x))
    back = unstack(many)
    assert len(back) == members(many) == len(group)
    assert all(equal(one, two) for one, two in zip(alone, back, strict=True))
    assert all(equal(a, stack(back)) for a in [many])


@pytest.mark.parametrize("group", [UNEQUAL[n] for n in ("ranks", "pissa", "dora", "loha", "vera")])
def test_padding_is_zero_and_gets_no_gradient(functional, group):
    model, params = functional
    alone = [made(functional, m, seed) for seed, m in enumerate(group)]
    many, net, x = stack(alone), adapt(model, group[0]), torch.randn(3, 8, dtype=torch.float64)

    def loss(p):
        return torch.func.vmap(lambda a: net(params, a, x).square().sum())(many.replace(params=p)).sum()

    grads, axes = torch.func.grad(loss)(many.params), dict(many.rank_axes)
    padded = 0
    for path, leaves in many.params.items():
        for name, t in leaves.items():
            for i, one in enumerate(alone):
                rank = one.params[path][name].shape[axes[name]] if name in axes else None
                if rank is not None and rank < t.shape[axes[name]]:
                    rest = [u[i].narrow(axes[name], rank, t.shape[axes[name]] - rank) for u in (t, grads[path][name])]
                    assert not rest[0].any()
                    assert not rest[1].any()
                    padded += 1
            assert grads[path][name].any(), name
    assert padded


def test_equal_constants_are_kept_once_and_unequal_ones_are_not(functional):
    model, params = functional
    net = adapt(model, VeRA(r=64, target_modules=["up", "down"]))
    many = stack([net.init(params, 0)] * 50)
    for path, leaves in many.consts.items():
        for name, t in leaves.items():
            assert t.shape[0] == 50
            assert t.stride(0) == 0, (path, name)
            assert t.untyped_storage().nbytes() == t[0].numel() * t.element_size()
    assert all(t.is_contiguous() for leaves in many.params.values() for t in leaves.values())
    keys = [VeRA(r=4, projection_prng_key=k, target_modules=["up", "down"]) for k in range(3)]
    differing = stack([adapt(model, method).init(params, 0) for method in keys])
    assert differing.consts[""]["A"].stride(0) != 0
    assert differing.consts["up"]["rank"].stride(0) == 0


def test_a_stack_aliases_none_of_its_members(functional):
    model, params = functional
    net = adapt(model, LoRA(r=2, target_modules=["up"], init_lora_weights="pissa"))
    one = net.init(params, 0)
    for other in (stack([one]), stack([one, one]), unstack(stack([one, one]))[0]):
        assert not {t.data_ptr() for t in tree_leaves(one)} & {t.data_ptr() for t in tree_leaves(other)}


def test_stacks_of_several_methods_are_tuples(functional):
    model, params = functional
    net = adapt(model, [LoRA(r=2, target_modules=["up"], bias="lora_only"), IA3(target_modules=["down"])])
    alone = [tuple(moved(a, s) for a in net.init(params, s)) for s in range(3)]
    many = stack(alone)
    assert isinstance(many, tuple)
    assert len(many) == 3
    assert all(equal(a, b) for a, b in zip(alone, unstack(many), strict=True))
    x = torch.randn(3, 8, dtype=torch.float64)
    got = torch.func.vmap(lambda a: net(params, a, x))(many)
    for i in range(3):
        torch.testing.assert_close(got[i], net(params, alone[i], x))


def test_what_does_not_stack_is_refused_by_name(functional):
    model, params = functional
    up = adapt(model, LoRA(r=2, target_modules=["up"])).init(params, 0)
    down = adapt(model, LoRA(r=2, target_modules=["down"])).init(params, 0)
    dora = adapt(model, DoRA(r=2, target_modules=["up"])).init(params, 0)
    with pytest.raises(ValueError, match="stack: a list of at least one adapter is required, got an empty list"):
        stack([])
    with pytest.raises(ValueError, match="stack: a list of at least one adapter is required, got one Adapter"):
        stack(up)
    with pytest.raises(TypeError, match="every member must have the same paths and leaves, got a difference at 'down', 'up'"):
        stack([up, down])
    with pytest.raises(TypeError, match="every member must have the same paths and leaves, got a difference at 'up'"):
        stack([up, dora])
    with pytest.raises(TypeError, match=r"every member must have as many adapters, got \[1, 2\]"):
        stack([(up,), (up, up)])
    with pytest.raises(TypeError, match=r"stack at 'up': leaf 'A' must have one dtype, got torch\.float32, torch\.float64"):
        stack([up, tree_map(lambda t: t.float() if t.is_floating_point() else t, up)])
    with pytest.raises(ValueError, match="unstack: every leaf must have the same leading axis, got sizes"):
        unstack(up)
    with pytest.raises(TypeError, match="an Adapter or a tuple of them is required, got dict"):
        stack([up.params])


def test_shapes_may_differ_along_the_rank_only(functional):
    model, params = functional
    spectra = [adapt(model, FourierFT(n_frequency=n, target_modules=["up"])).init(params, 0) for n in (4, 6)]
    with pytest.raises(ValueError, match=r"stack at 'up': leaf '\w+' must have one shape, it has no rank axis, got"):
        stack(spectra)
    a = Adapter({"s": {"A": torch.zeros(2, 3)}}, {}, (("A", -2),))
    with pytest.raises(ValueError, match=r"stack at 's': leaf 'A' may differ along its rank only, got \[\(2, 3\), \(2, 4\)\]"):
        stack([a, a.replace(params={"s": {"A": torch.zeros(2, 4)}})])
