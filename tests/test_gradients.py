"""The value and gradient of a loss: one result by plain autograd, inside transforms, and compiled."""

import pytest
import torch
from torch import Tensor, nn

from funcpeft.adapt import adapt
from funcpeft.functional import functionalize
from funcpeft.gradients import value_and_grad
from funcpeft.methods import LoRA
from funcpeft.stacking import stack, unstack
from funcpeft.tree import Adapter, tree_leaves, tree_map


def make(seed: int = 0) -> Adapter:
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    params = {"one": {"A": draw(2, 3), "unused": draw(2)}, "two": {"B": draw(4, 2)}}
    return Adapter(params, {"one": {"scaling": torch.tensor(0.5, dtype=torch.float64), "rank": torch.tensor(2)}})


X = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)


def loss_fn(adapter: Adapter, x: Tensor, power: int = 2) -> Tensor:
    one = adapter.leaves("one")
    y = one["scaling"] * x @ one["A"].mT @ adapter.leaves("two")["B"].mT
    return torch.tanh(y).pow(power).sum()


def assert_same(a, b, **tolerance: float) -> None:
    tree_map(lambda s, t: torch.testing.assert_close(s, t, **(tolerance or {"rtol": 1e-12, "atol": 1e-14})), a, b)


def reference(adapter: Adapter, x: Tensor, power: int = 2):
    return torch.func.grad(lambda params: loss_fn(adapter.replace(params=params), x, power))(adapter.params)


def test_value_and_gradient():
    adapter = make()
    loss, grads = value_and_grad(loss_fn)(adapter, X, power=4)
    assert loss == loss_fn(adapter, X, power=4)
    assert_same(grads, reference(adapter, X, 4))
    assert grads["one"]["unused"].count_nonzero() == 0
    assert not any(t.requires_grad for t in (loss, *tree_leaves(grads)))


def test_nothing_given_is_touched():
    adapter, before = make(), make()
    adapter.params["one"]["A"].requires_grad_()
    x = X.clone().requires_grad_()
    value_and_grad(loss_fn)(adapter, x)
    assert [t.requires_grad for t in tree_leaves(adapter.params)] == [True, False, False]
    assert adapter.params["one"]["A"].grad is None
    assert x.grad is None
    assert_same(adapter.params, before.params, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_mode_outside_does_not_matter(mode):
    expected = value_and_grad(loss_fn)(make(), X)
    adapter = make()
    with mode():
        got = value_and_grad(loss_fn)(adapter, X)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert_same(got, expected, rtol=0, atol=0)


def test_vmap_is_a_loop():
    members = [make(s) for s in range(3)]
    many = stack(members)
    losses, grads = torch.func.vmap(value_and_grad(loss_fn), in_dims=(0, None))(many, X)
    for i, one in enumerate(members):
        loss, expected = value_and_grad(loss_fn)(one, X)
        assert_same((losses[i], tree_map(lambda g, i=i: g[i], grads)), (loss, expected))


def test_derivatives_of_the_gradient():
    adapter = make()
    by_x = torch.func.jacrev(lambda x: value_and_grad(loss_fn)(adapter, x)[1]["two"]["B"])(X)
    by_b = torch.func.jacrev(
        lambda b: torch.func.grad(lambda x: loss_fn(adapter.replace(params={**adapter.params, "two": {"B": b}}), x))(X)
    )
    torch.testing.assert_close(by_x.permute(2, 3, 0, 1), by_b(adapter.params["two"]["B"]))
    tangent = torch.ones_like(X)
    _, along = torch.func.jvp(lambda x: value_and_grad(loss_fn)(adapter, x)[1]["two"]["B"], (X,), (tangent,))
    torch.testing.assert_close(along, (by_x * tangent).sum((-1, -2)))


def test_compiled():
    def with_aux(adapter: Adapter, x: Tensor):
        return loss_fn(adapter, x), {"x": 2 * x}

    f = value_and_grad(with_aux, has_aux=True)
    mapped = torch.func.vmap(value_and_grad(loss_fn), in_dims=(0, None))
    for function, adapter in ((f, make()), (mapped, stack([make(0), make(1)]))):
        torch._dynamo.reset()
        assert_same(torch.compile(function, fullgraph=True, backend="aot_eager")(adapter, X), function(adapter, X))


def test_a_tuple_of_adapters():
    whole = make()
    parts = tuple(Adapter({p: whole.params[p]}, {p: whole.consts.get(p, {})}) for p in whole.params)

    def loss_of_parts(parts: tuple[Adapter, ...], x: Tensor) -> Tensor:
        assert isinstance(parts, tuple)
        return loss_fn(Adapter({**parts[0].params, **parts[1].params}, parts[0].consts), x)

    f = value_and_grad(loss_of_parts)
    loss, grads = f(parts, X)
    expected = value_and_grad(loss_fn)(whole, X)
    assert isinstance(grads, tuple)
    assert_same((loss, {**grads[0], **grads[1]}), expected)
    many = stack([parts, parts])
    losses, mapped = torch.func.vmap(f, in_dims=(0, None))(many, X)
    assert isinstance(mapped, tuple)
    assert_same((losses[1], mapped[1]["two"]["B"][1]), (loss, grads[1]["two"]["B"]))


def test_aux_is_returned_detached():
    def with_aux(adapter: Adapter, x: Tensor):
        loss = loss_fn(adapter, x)
        return loss, {"double": 2 * loss, "name": ("a", 1)}

    (loss, aux), grads = value_and_grad(with_aux, has_aux=True)(make(), X)
    assert aux["name"] == ("a", 1)
    assert aux["double"] == 2 * loss
    assert not aux["double"].requires_grad
    assert_same(grads, reference(make(), X))
    with pytest.raises(TypeError, match="inside a transform aux must be a tree of tensors, got str"):
        torch.func.vmap(value_and_grad(with_aux, has_aux=True), in_dims=(0, None))(stack([make()]), X)


def test_leaves_that_the_loss_does_not_reach_have_zero_gradients():
    for f in (
        value_and_grad(lambda a, x: x.sum()),
        value_and_grad(lambda a, x: (x * a.params["two"]["B"].detach().sum()).sum()),
    ):
        zeros = tree_map(torch.zeros_like, make().params)
        assert_same(f(make(), X)[1], zeros)
        mapped = torch.func.vmap(f, in_dims=(0, None))(stack([make()]), X)[1]
        assert_same(tree_map(lambda g: g[0], mapped), zeros)
    assert value_and_grad(lambda a, x: x.sum())(Adapter(), X)[1] == {}


@pytest.mark.parametrize(
    ("loss", "kind", "text"),
    [
        (lambda a: 1.0, TypeError, "must be a 0-d floating tensor, got float"),
        (lambda a: torch.tensor(1), TypeError, "got torch.int64"),
        (lambda a: (torch.tensor(1.0), 2), TypeError, "got tuple; pass has_aux=True"),
        (lambda a: a.params["two"]["B"].sum(0), ValueError, r"0-d tensor, got shape \(2,\); reduce it"),
        (lambda a: a.params["two"]["B"].sum().reshape(1), ValueError, r"got shape \(1,\)"),
    ],
)
def test_errors_of_the_loss(loss, kind, text):
    with pytest.raises(kind, match=text):
        value_and_grad(loss)(make())
    with pytest.raises(kind, match=text):
        torch.func.vmap(value_and_grad(loss))(stack([make(), make()]))


def test_errors():
    with pytest.raises(TypeError, match=r"must return \(loss, aux\), got Tensor"):
        value_and_grad(loss_fn, has_aux=True)(make(), X)
    with pytest.raises(TypeError, match="an Adapter or a tuple of them is required, got dict"):
        value_and_grad(loss_fn)({}, X)
    for bad, found in ((torch.tensor([1]), "torch.int64"), (1.0, "float")):
        with pytest.raises(TypeError, match=f"adapter at 'site': leaf 'A' of params must be a floating tensor, got {found}"):
            value_and_grad(loss_fn)(Adapter({"site": {"A": bad}}), X)


def test_a_net():
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    model, params = functionalize(module)
    net = adapt(model, LoRA(r=2, target_modules=["0", "2"], init_lora_weights=False))
    members = [net.init(params, seed=s) for s in range(3)]

    def loss(adapter, x: Tensor) -> Tensor:
        return net(params, adapter, x).square().mean()

    f = value_and_grad(loss)
    many = stack(members)
    losses, grads = torch.func.vmap(f, in_dims=(0, None))(many, X)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for i, one in enumerate(unstack(many)):
        expected = f(one, X)
        assert_same((losses[i], tree_map(lambda g, i=i: g[i], grads)), expected)
        assert_same(compiled(one, X), expected)
    assert all(p.grad is None for p in module.parameters())
