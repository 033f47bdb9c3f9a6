"""The value and gradient of a loss: one result by plain autograd, inside transforms, and compiled; populations by chunks."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from funcpeft.adapt import adapt
from funcpeft.chunks import TOKENS
from funcpeft.functional import functionalize
from funcpeft.gradients import accumulate, value_and_grad
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


# -- many members ------------------------------------------------------------------------------------------------------------

MANY = [make(s) for s in range(5)]
BATCHES = torch.linspace(-2, 1, 75, dtype=torch.float64).reshape(5, 5, 3)


def losses_fn(many: Adapter, x: Tensor, power: int = 2) -> Tensor:
    return torch.func.vmap(lambda a, x: loss_fn(a, x, power))(many, x)


def loop(batches=BATCHES, power: int = 2):
    """What each member gets by itself."""
    each = [value_and_grad(loss_fn)(one, x, power) for one, x in zip(MANY, batches, strict=True)]
    return torch.stack([loss for loss, _ in each]), tree_map(lambda *g: torch.stack(g), *(grads for _, grads in each))


@pytest.mark.parametrize("chunk_size", ["auto", None, 1, 2, 5, 7])
def test_a_population_is_a_loop(chunk_size):
    f = value_and_grad(losses_fn, in_dims=0, chunk_size=chunk_size)
    expected = loop(power=3)
    assert_same(f(stack(MANY), BATCHES, power=3), expected)
    moved = value_and_grad(lambda a, x: losses_fn(a, x.movedim(1, 0), 3), in_dims=(1,), chunk_size=chunk_size)
    assert_same(moved(stack(MANY), BATCHES.movedim(0, 1)), expected)
    last = value_and_grad(lambda a, x: losses_fn(a, x["x"].movedim(-1, 0), 3), in_dims=({"x": -1},), chunk_size=chunk_size)
    assert_same(last(stack(MANY), {"x": BATCHES.movedim(0, -1)}), expected)
    many = stack(MANY)
    with torch.inference_mode():
        assert_same(f(many, BATCHES, power=3), expected)


def test_what_all_members_share_is_not_cut():
    def shared(many: Adapter, x: Tensor, scale: Tensor, *, offset: Tensor):
        losses = torch.func.vmap(lambda a: loss_fn(a, x))(many)
        return scale.sum() * losses + offset.sum(), {"losses": losses, "two": [torch.stack([losses, losses], 1)]}

    f = value_and_grad(shared, has_aux=True, in_dims=(None, None), chunk_size=2)
    offset = torch.ones(5, dtype=torch.float64)
    (losses, aux), grads = f(stack(MANY), X, torch.ones(5), offset=offset)
    expected = loop([X] * 5)
    assert_same((losses, grads), (5 * expected[0] + 5, tree_map(lambda g: 5 * g, expected[1])))
    assert_same(aux, {"losses": expected[0], "two": [torch.stack([expected[0]] * 2, 1)]})
    assert not aux["losses"].requires_grad


def test_a_population_of_tuples_inside_transforms():
    def of_parts(parts, x: Tensor) -> Tensor:
        return losses_fn(Adapter({**parts[0].params, **parts[1].params}, parts[0].consts), x)

    many = stack([tuple(Adapter({p: m.params[p]}, {p: m.consts.get(p, {})}) for p in m.params) for m in MANY])
    f = value_and_grad(of_parts, in_dims=0, chunk_size=2)
    losses, grads = f(many, BATCHES)
    expected = loop()
    assert_same((losses, {**grads[0], **grads[1]}), expected)
    mapped = torch.func.vmap(f, in_dims=(None, 0))(many, torch.stack([BATCHES, 2 * BATCHES]))
    assert_same(tree_map(lambda t: t[1], mapped), f(many, 2 * BATCHES))
    torch._dynamo.reset()
    assert_same(torch.compile(f, fullgraph=True, backend="aot_eager")(many, BATCHES), (losses, grads))


def sizes_seen(*args, in_dims, members: int = 12, **kwargs) -> list[int]:
    """Lists how many members were computed at a time by the rule."""
    seen = []

    def f(many: Adapter, *args, **kwargs) -> Tensor:
        seen.append(many.params["a"]["v"].shape[0])
        return many.params["a"]["v"].sum(-1)

    value_and_grad(f, in_dims=in_dims)(Adapter({"a": {"v": torch.ones(members, 2)}}), *args, **kwargs)
    return seen


def test_the_rule_counts_tokens():
    tokens = TOKENS // 4
    ids = torch.zeros(12, 2, tokens // 2, dtype=torch.int64)
    assert sizes_seen(ids, in_dims=0) == [4, 4, 4]
    assert sizes_seen(ids, ids[0, :, 0], in_dims=(0, None)) == [4, 4, 4]
    assert sizes_seen(ids[0], in_dims=(None,)) == [4, 4, 4]
    assert sizes_seen(in_dims=(), labels=ids[0]) == [4, 4, 4]
    assert sizes_seen(ids.movedim(0, 2), in_dims=2, members=12) == [4, 4, 4]
    assert sizes_seen(torch.zeros(12, tokens, 7), in_dims=0) == [4, 4, 4]
    assert sizes_seen(torch.zeros(12, 2, tokens), in_dims=0) == [12]
    assert sizes_seen(ids[:10], in_dims=0, members=10) == [4, 4, 2]
    assert sizes_seen(ids[:9], in_dims=0, members=9) == [3, 3, 3]
    assert sizes_seen(ids[:, :, :1].expand(12, 2, 9 * tokens), in_dims=0) == [1] * 12
    assert sizes_seen(in_dims=()) == [12]
    assert sizes_seen("text", in_dims=(None,)) == [12]


def test_errors_of_populations():
    for bad in ([0], True, "0"):
        with pytest.raises(TypeError, match="in_dims must be an int, a tuple or None"):
            value_and_grad(losses_fn, in_dims=bad)
    for bad in (True, 2.0, "all"):
        with pytest.raises(TypeError, match="chunk_size must be an int, 'auto' or None"):
            value_and_grad(losses_fn, in_dims=0, chunk_size=bad)
    with pytest.raises(ValueError, match="chunk_size must be positive, got 0"):
        value_and_grad(losses_fn, in_dims=0, chunk_size=0)
    with pytest.raises(ValueError, match="chunk_size is for a stack of members, got 2; say with in_dims"):
        value_and_grad(losses_fn, chunk_size=2)
    f = value_and_grad(losses_fn, in_dims=(0,))
    with pytest.raises(ValueError, match=r"every leaf of the adapter must have the same leading axis, got sizes \[0, 2, 4\]"):
        f(make(), BATCHES)
    with pytest.raises(ValueError, match=r"in_dims must be a tree prefix .* got in_dims \(0,\) for 2 inputs"):
        f(stack(MANY), BATCHES, BATCHES)
    with pytest.raises(TypeError, match="input leaf 0: its entry of in_dims must be an int or None, got '0'"):
        value_and_grad(losses_fn, in_dims=("0",))(stack(MANY), BATCHES)
    with pytest.raises(TypeError, match="input leaf 1: a tensor is required where in_dims is 0, got int; give None"):
        value_and_grad(losses_fn, in_dims=0)(stack(MANY), BATCHES, 3)
    for bad in (BATCHES[:4], torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"input leaf 0: axis 0 must hold the 5 members, got shape"):
            f(stack(MANY), bad)
    with pytest.raises(ValueError, match=r"one loss per member, shape \(5,\), got shape \(\); reduce every axis"):
        value_and_grad(lambda a, x: losses_fn(a, x).sum(), in_dims=0)(stack(MANY), BATCHES)
    with pytest.raises(TypeError, match=r"the loss must be a floating tensor of shape \(5,\), got float"):
        value_and_grad(lambda a: 1.0, in_dims=())(stack(MANY))
    aux = lambda aux: value_and_grad(lambda a, x: (losses_fn(a, x), aux), has_aux=True, in_dims=0)  # noqa: E731
    with pytest.raises(TypeError, match=r"aux\['name'\]: with in_dims aux must be a tree of tensors, got str"):
        aux({"name": "a"})(stack(MANY), BATCHES)
    for bad in (torch.tensor(1.0), torch.ones(3)):
        with pytest.raises(ValueError, match=r"aux\[0\]: the leading axis must be the 5 members', got shape"):
            aux([bad])(stack(MANY), BATCHES)


# -- micro-batches -----------------------------------------------------------------------------------------------------------


def mean_loss(adapter: Adapter, x: Tensor, y: Tensor):
    each = (torch.tanh(x @ adapter.params["one"]["A"].mT) - y).square().mean(-1)
    return each.mean(), {"mean": each.mean(), "largest": (each.mean(), x.mean(0))}


ROWS = torch.linspace(-1, 2, 30, dtype=torch.float64).reshape(10, 3).sin()


@pytest.mark.parametrize("sizes", [[10], [3, 3, 4], [1, 9]])
def test_micro_batches_are_the_batch(sizes):
    step = value_and_grad(mean_loss, has_aux=True)
    expected = step(make(), ROWS, ROWS[:, :2])
    parts = ROWS.split(sizes)
    batches = ((x, x[:, :2]) for x in parts)
    assert_same(accumulate(step, make(), batches, sizes), expected)
    assert_same(accumulate(step, make(), [[x, x[:, :2]] for x in parts], torch.tensor(sizes)), expected)
    shares = [torch.tensor(n / 10, dtype=torch.float64) for n in sizes]
    assert_same(accumulate(step, make(), [(x, x[:, :2]) for x in parts], shares), expected)


def test_micro_batches_without_weights_count_alike():
    step = value_and_grad(mean_loss, has_aux=True)
    got = accumulate(step, make(), [(x, x[:, :2]) for x in ROWS.split(5)])
    assert_same(got, step(make(), ROWS, ROWS[:, :2]))


def test_micro_batches_of_a_population():
    def losses(many: Adapter, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda a, x: mean_loss(a, x, x[:, :2])[0])(many, x)

    step = value_and_grad(losses, in_dims=0, chunk_size=2)
    many, x = stack(MANY), torch.stack([ROWS * (i + 1) for i in range(5)])
    assert_same(accumulate(step, many, [(x[:, :3],), (x[:, 3:],)], [3, 7]), step(many, x))
    per_member = [torch.tensor([1, 0, 3, 0, 1]), torch.tensor([1, 2, 0, 5, 1])]
    loss, grads = accumulate(step, many, [(x[:, :5],), (x[:, 5:],)], per_member)
    first, second = step(many, x[:, :5]), step(many, x[:, 5:])
    assert_same(tree_map(lambda t: t[2], (loss, grads)), tree_map(lambda t: t[2], first))
    assert_same(tree_map(lambda t: t[3], (loss, grads)), tree_map(lambda t: t[3], second))
    assert_same(tree_map(lambda t: t[4], grads), tree_map(lambda s, t: (s[4] + t[4]) / 2, first[1], second[1]))


def test_sums_are_wide_and_rounded_once():
    step = lambda adapter, value, count: ((value, {"count": count}), {"a": value})  # noqa: E731
    values = [1.0, *[2.0**-9] * 15]
    batches = [(torch.tensor(v, dtype=torch.bfloat16), torch.tensor(i)) for i, v in enumerate(values)]
    (loss, aux), grads = accumulate(step, Adapter(), batches)
    expected = torch.tensor(sum(values) / 16).bfloat16()
    assert loss.dtype == grads["a"].dtype == torch.bfloat16
    assert loss == grads["a"] == expected
    assert aux["count"].dtype == torch.float32
    assert aux["count"] == 7.5


def test_one_micro_batch_lives_at_a_time():
    alive: list[weakref.ref[Tensor]] = []

    def loss(adapter: Adapter, x: Tensor) -> Tensor:
        assert sum(r() is not None for r in alive) == 0
        hidden = (adapter.params["one"]["A"] * x.sum()).exp()
        alive.append(weakref.ref(hidden))
        return hidden.square().sum()

    accumulate(value_and_grad(loss), make(), ((ROWS[i],) for i in range(3)))
    assert len(alive) == 3


def test_errors_of_micro_batches():
    step = value_and_grad(lambda a, x: loss_fn(a, x))
    for bad in (X, {"x": X}):
        with pytest.raises(TypeError, match=r"a batch must be a tuple or a list, got .*; wrap what step takes"):
            accumulate(step, make(), [bad])
    with pytest.raises(ValueError, match="at least one batch is required, got none"):
        accumulate(step, make(), [])
    with pytest.raises(ValueError, match="weights must be as many as batches, got 1, and more batches"):
        accumulate(step, make(), [(X,), (X,)], [1])
    with pytest.raises(ValueError, match="weights must be as many as batches, got 2 for 1"):
        accumulate(step, make(), [(X,)], [1, 2])
    with pytest.raises(ValueError, match=r"weights must not all be zero, got \[0.0\]"):
        accumulate(step, make(), [(X,)], [0])
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a weight must be finite and not negative, got"):
            accumulate(step, make(), [(X,)], [bad])
    for bad in ("1", True):
        with pytest.raises(TypeError, match="a weight must be a number or a tensor, got"):
            accumulate(step, make(), [(X,)], [bad])
    with pytest.raises(ValueError, match=r"a number, or one per member, got shape \(1, 1\)"):
        accumulate(step, make(), [(X,)], [torch.ones(1, 1)])
    with pytest.raises(ValueError, match=r"weights of 3 members need results with that axis, got shape \(\); give one"):
        accumulate(step, make(), [(X,)], [torch.ones(3)])
    named = value_and_grad(lambda a, x: (loss_fn(a, x), x if x.numel() > 3 else "text"), has_aux=True)
    with pytest.raises(TypeError, match="step must return a tree of tensors, got str; leave it out of aux"):
        accumulate(named, make(), [(X[:1],)])
    with pytest.raises(ValueError, match=r"one shape in all batches, got \(5, 3\) and \(2, 3\); reduce"):
        accumulate(named, make(), [(X,), (X[:2],)])
