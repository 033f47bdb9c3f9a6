"""Optimizer transforms for low-rank factors, step for step against peft's and against their formulas."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from torch import nn

import funcpeft as fp
from funcpeft import optim
from funcpeft.tree import tree_map


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.norm, self.lin1 = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x):
        return self.lin1(self.norm(torch.tanh(self.lin0(x))))


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).double()
FIELDS = {"r": 4, "lora_alpha": 6, "target_modules": ["lin0", "lin1"]}


def base():
    torch.manual_seed(0)
    return Mlp().double()


def both(**fields):
    """Returns peft's model, and net, params and the same adapter here."""
    module = base()
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(module, peft.LoraConfig(**FIELDS, init_lora_weights=False, **fields))
    model, params = fp.functionalize(base())
    net = fp.adapt(model, fp.LoRA(**FIELDS, init_lora_weights=False, **fields))
    return wrapped, net, params, fp.peft_init(net, params, 5)


def run(net, params, adapter, opt, steps=4):
    state = opt.init(adapter)
    for _ in range(steps):
        _, grads = fp.value_and_grad(lambda a: net(params, a, X).square().mean())(adapter)
        adapter, state = opt.update(grads, state, adapter)
    return adapter


def train(wrapped, optimizer, steps=4):
    for _ in range(steps):
        optimizer.zero_grad()
        wrapped.base_model.model(X).square().mean().backward()
        optimizer.step()


def require_equal(wrapped, adapter, rtol=1e-9, atol=1e-12):
    one = adapter[0] if isinstance(adapter, tuple) else adapter
    for path, leaves in one.params.items():
        layer = wrapped.base_model.model.get_submodule(path)
        for name in ("A", "B"):
            want = getattr(layer, f"lora_{name}")["default"].weight.detach()
            torch.testing.assert_close(leaves[name], want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lora_plus_is_pefts(decay):
    wrapped, net, params, adapter = both(bias="all", modules_to_save=["norm"])
    optimizer = create_loraplus_optimizer(
        wrapped, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0, loraplus_weight_decay=decay
    )
    train(wrapped, optimizer)
    moved = run(net, params, adapter, optim.lora_plus(1e-2, 8.0, weight_decay=decay, norms=["norm"]))
    require_equal(wrapped, moved)
    saved = {p: v["value"] for one in moved[1:] for p, v in one.params.items()}
    inner = wrapped.base_model.model
    wanted = {
        "norm.weight": inner.norm.modules_to_save["default"].weight,
        "lin0.bias": inner.lin0.base_layer.bias,
        "lin1.bias": inner.lin1.base_layer.bias,
    }
    for path, want in wanted.items():
        torch.testing.assert_close(saved[path], want.detach(), rtol=1e-9, atol=1e-12)


def test_embeddings_have_a_step_of_their_own():
    model, params = fp.functionalize(nn.Sequential(nn.Embedding(9, 4)).double())
    net = fp.adapt(model, fp.LoRA(r=2, target_modules=["0"], init_lora_weights=False))
    adapter, ids = net.init(params, 0), torch.arange(9)
    _, grads = fp.value_and_grad(lambda a: net(params, a, ids).square().mean())(adapter)
    opt = optim.lora_plus(1e-2, 8.0, embeddings=["0"], embedding_lr=1e-5)
    moved, _ = opt.update(grads, opt.init(adapter), adapter)
    for name, t in moved.params["0"].items():
        torch.testing.assert_close((t - adapter.params["0"][name]).abs().max(), torch.tensor(1e-5).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("inner", ["sgd", "adamw"])
def test_riemannian_preconditioning_is_pefts(inner):
    wrapped, net, params, adapter = both()
    cls, options, opt = {
        "sgd": (torch.optim.SGD, {}, optim.sgd(0.1)),
        "adamw": (torch.optim.AdamW, {"weight_decay": 0.01}, optim.adamw(0.1, weight_decay=0.01)),
    }[inner]
    train(wrapped, create_riemannian_optimizer(wrapped, cls, lr=0.1, reg=0.02, **options))
    require_equal(wrapped, run(net, params, adapter, optim.chain(optim.riemannian(0.02), opt)), rtol=1e-7, atol=1e-9)


def test_a_fresh_factor_of_zeros_is_preconditioned():
    model, params = fp.functionalize(base())
    net = fp.adapt(model, fp.LoRA(**FIELDS))
    moved = run(net, params, net.init(params, 0), optim.chain(optim.riemannian(), optim.sgd(0.1)))
    assert all(bool(torch.isfinite(t).all()) for v in moved.params.values() for t in v.values())


def test_lora_fa_moves_b_alone_along_the_nearest_gradient():
    _, net, params, adapter = both()
    moved = run(net, params, adapter, optim.lora_fa(1e-2, weight_decay=0.1))
    for path, leaves in adapter.params.items():
        assert torch.equal(moved.params[path]["A"], leaves["A"])
        assert not torch.equal(moved.params[path]["B"], leaves["B"])
    _, grads = fp.value_and_grad(lambda a: net(params, a, X).square().mean())(adapter)
    factor = optim.chain(list(optim.lora_fa(1e-2).transforms.values())[0])  # noqa: RUF015
    turned, _ = factor(grads, factor.init(adapter), adapter)
    for path, leaves in adapter.params.items():
        a = leaves["A"]
        want = grads[path]["B"] @ torch.linalg.pinv(a @ a.T + 1e-8 * torch.eye(4).double()) / 1.5**2
        torch.testing.assert_close(turned[path]["B"], want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "bias": "all"}], ids=str)
def test_lora_fa_is_pefts_in_float64(fields, decay):
    wrapped, net, params, adapter = both(**fields)
    train(wrapped, create_lorafa_optimizer(wrapped, r=4, lora_alpha=6, lr=1e-2, weight_decay=decay))
    moved = run(net, params, adapter, optim.lora_fa(1e-2, weight_decay=decay))
    require_equal(wrapped, moved)
    for path, leaves in (moved[1].params if fields else {}).items():
        bias = wrapped.base_model.model.get_submodule(path.removesuffix(".bias"))
        bias = getattr(bias, "base_layer", bias).bias
        torch.testing.assert_close(leaves["value"], bias.detach(), rtol=1e-9, atol=1e-12)


def test_lora_fa_of_dependent_rows_is_pefts():
    """A of rank below r has no inverse that rounding leaves alone."""
    wrapped, net, params, adapter = both()
    for path, leaves in adapter.params.items():
        leaves["A"][2:] = leaves["A"][:2]
        with torch.no_grad():
            wrapped.base_model.model.get_submodule(path).lora_A["default"].weight[2:] = leaves["A"][:2]
    train(wrapped, create_lorafa_optimizer(wrapped, r=4, lora_alpha=6, lr=1e-2))
    require_equal(wrapped, run(net, params, adapter, optim.lora_fa(1e-2)), rtol=1e-5, atol=1e-7)
    single = run(net, params, tree_map(torch.Tensor.float, adapter), optim.lora_fa(1e-2))
    assert all(bool(torch.isfinite(t).all()) for v in single.params.values() for t in v.values())


def test_lora_fa_takes_a_frozen_a():
    _, net, params, adapter = both()
    frozen = fp.Adapter(
        {p: {"B": v["B"]} for p, v in adapter.params.items()},
        {p: {**v, "A": adapter.params[p]["A"]} for p, v in adapter.consts.items()},
        adapter.rank_axes,
    )
    want, got = (run(net, params, a, optim.lora_fa(1e-2)) for a in (adapter, frozen))
    for path, leaves in got.params.items():
        assert torch.equal(leaves["B"], want.params[path]["B"])


def test_leaves_of_other_shapes_are_no_pair():
    model, params = fp.functionalize(base())
    net = fp.adapt(model, fp.AdaMSS(r=3, num_subspaces=2, target_modules=["lin0"]))
    adapter = net.init(params, 0)
    want = run(net, params, adapter, optim.sgd(0.1), steps=2)
    got = run(net, params, adapter, optim.chain(optim.riemannian(), optim.sgd(0.1)), steps=2)
    for name, t in got.params["lin0"].items():
        assert torch.equal(t, want.params["lin0"][name])


def test_lora_plus_follows_a_schedule_from_zero():
    _, net, params, adapter = both()
    schedule = optim.linear_warmup(1e-2, 4)
    still = run(net, params, adapter, optim.lora_plus(schedule), steps=1)
    moved = run(net, params, adapter, optim.lora_plus(schedule, weight_decay=0.1), steps=3)
    for path, leaves in adapter.params.items():
        for name, t in leaves.items():
            assert torch.equal(still.params[path][name], t)
            assert 0 < float((moved.params[path][name] - t).abs().max()) < 1


@pytest.mark.parametrize(
    "make",
    [
        lambda lr: optim.lora_plus(lr, 4.0, weight_decay=0.1),
        lambda lr: optim.chain(optim.riemannian(), optim.adamw(lr)),
        lambda lr: optim.lora_fa(lr),
    ],
)
def test_members_step_as_they_do_alone(make):
    _, net, params, _ = both()
    ads = [net.init(params, s) for s in range(3)]
    many, lr = fp.stack(ads), torch.tensor([1e-3, 1e-2, 3e-2], dtype=torch.float64)
    opt, state = make(lr), None
    state = opt.init(many)
    _, grads = fp.value_and_grad(lambda a: sum(o.square().mean() for o in fp.apply_many(net, params, a, X, in_dims=None)))(many)
    moved, _ = opt.update(grads, state, many)
    for i, (one, back) in enumerate(zip(ads, fp.unstack(moved), strict=True)):
        alone = make(float(lr[i]))
        _, g = fp.value_and_grad(lambda a: net(params, a, X).square().mean())(one)
        want, _ = alone.update(g, alone.init(one), one)
        for path, leaves in want.params.items():
            for name, t in leaves.items():
                torch.testing.assert_close(back.params[path][name], t, rtol=1e-6, atol=1e-9)


def test_hyperparameters_are_checked():
    with pytest.raises(ValueError, match="riemannian: reg"):
        optim.riemannian(0.0)
    with pytest.raises(ValueError, match="lora_plus: ratio"):
        optim.lora_plus(1e-3, -1.0)
    _, net, params, adapter = both()
    with pytest.raises(ValueError, match="lora_plus: norms must be paths of the adapter, got 'lin2'; did you mean"):
        run(net, params, adapter, optim.lora_plus(1e-3, norms=["lin2"]), steps=1)
    with pytest.raises(ValueError, match="lora_plus: embeddings must be paths of the adapter, got 'emb'"):
        run(net, params, adapter, optim.lora_plus(1e-3, embeddings=["emb"]), steps=1)
