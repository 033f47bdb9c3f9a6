"""The optimizers against torch.optim, members against a loop over members, and what an update promises."""

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from funcpeft import optim
from funcpeft.gradients import value_and_grad
from funcpeft.stacking import stack, unstack
from funcpeft.tree import Adapter, tree_leaves, tree_map

STEPS = 20
F64 = {"atol": 1e-13, "rtol": 1e-12}


def lora(rank: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Adapter:
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)  # noqa: E731
    params = {"up": {"A": draw(rank, 5), "B": draw(4, rank)}, "down": {"A": draw(rank, 4), "B": draw(5, rank)}}
    consts = {path: {"rank": torch.tensor(rank), "scaling": torch.tensor(2.0 / rank).to(dtype)} for path in params}
    return Adapter(params, consts, (("A", -2), ("B", -1)))


def loss_fn(adapter: Adapter, x: Tensor) -> Tensor:
    for path in ("up", "down"):
        leaves = adapter.leaves(path)
        x = torch.tanh(x @ leaves["A"].mT @ leaves["B"].mT * leaves["scaling"])
    return 3 * (x - 1).square().mean()


X = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(6, 5)
gradient = value_and_grad(loss_fn)


def trained(opt: optim.Optimizer, adapter: Adapter, steps: int = STEPS, members: int | None = None) -> Adapter:
    """Trains; a stacked adapter if ``members`` is given, every member on its own loss."""
    step = gradient if members is None else torch.func.vmap(gradient, in_dims=(0, None))
    state = opt.init(adapter, members)
    for _ in range(steps):
        adapter, state = opt.update(step(adapter, X)[1], state, adapter)
    return adapter


def by_torch(make, adapter: Adapter, max_norm: float | None = None) -> Adapter:
    live = adapter.replace(params=tree_map(lambda t: t.clone().requires_grad_(), adapter.params))
    opt = make(tree_leaves(live.params))
    for _ in range(STEPS):
        opt.zero_grad()
        loss_fn(live, X).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(tree_leaves(live.params), max_norm)
        opt.step()
    return live.replace(params=tree_map(lambda t: t.detach(), live.params))


def assert_same(a: Adapter, b: Adapter, **tolerance: float) -> None:
    tree_map(lambda s, t: torch.testing.assert_close(s, t, **tolerance), a.params, b.params)


# -- against torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "weight_decay": 0.1}, {"weight_decay": 0.3}],
)
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_sgd_is_torchs(options, max_norm):
    opt = optim.sgd(0.05, **options)
    ours = trained(opt if max_norm is None else optim.chain(optim.clip_by_global_norm(max_norm), opt), lora())
    assert_same(ours, by_torch(lambda p: torch.optim.SGD(p, lr=0.05, **options), lora(), max_norm), **F64)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.0}, {"betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.5}, {"betas": (0.0, 0.0)}]
)
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_adamw_is_torchs(options, max_norm):
    opt = optim.adamw(0.05, **options)
    ours = trained(opt if max_norm is None else optim.chain(optim.clip_by_global_norm(max_norm), opt), lora())
    assert_same(ours, by_torch(lambda p: torch.optim.AdamW(p, lr=0.05, **options), lora(), max_norm), **F64)


def test_float32_is_close_to_torchs():
    adapter = lora(dtype=torch.float32)
    grads = tree_map(torch.cos, adapter.params)
    opt, live = optim.adamw(0.05), tree_map(lambda t: t.clone().requires_grad_(), adapter.params)
    state, reference = opt.init(adapter), torch.optim.AdamW(tree_leaves(live), lr=0.05)
    for _ in range(STEPS):
        adapter, state = opt.update(grads, state, adapter)
        for p, g in zip(tree_leaves(live), tree_leaves(grads), strict=True):
            p.grad = g.clone()
        reference.step()
    tree_map(lambda a, b: torch.testing.assert_close(a, b.detach(), atol=2e-6, rtol=2e-6), adapter.params, live)


def test_schedules_are_those_of_transformers_and_torch():
    def values(schedule, steps=15):
        return torch.stack([schedule(torch.tensor(s)) for s in range(steps)])

    def reference(make):
        opt = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        scheduler, out = make(opt), []
        for _ in range(15):
            out.append(opt.param_groups[0]["lr"])
            opt.step()
            scheduler.step()
        return torch.tensor(out, dtype=torch.float64)

    rates = torch.optim.lr_scheduler
    torch.testing.assert_close(
        values(optim.warmup_cosine(0.1, 5, 15)), reference(lambda o: get_cosine_schedule_with_warmup(o, 5, 15)), **F64
    )
    torch.testing.assert_close(
        values(optim.cosine(0.1, 14, 0.01)), reference(lambda o: rates.CosineAnnealingLR(o, 14, 0.01)), **F64
    )
    torch.testing.assert_close(
        values(optim.linear_warmup(0.1, 4)), reference(lambda o: rates.LambdaLR(o, lambda s: min(1.0, s / 4))), **F64
    )
    assert values(optim.constant(0.1)).unique().tolist() == [0.1]


# -- members -----------------------------------------------------------------------------------------------------------

LR, NORM = [0.01, 0.1, 0.3], [0.2, 1.0, 5.0]


def _population(make) -> tuple[optim.Optimizer, list[optim.Optimizer]]:
    lr, norm = torch.tensor(LR, dtype=torch.float64), torch.tensor(NORM, dtype=torch.float64)
    return make(lr, norm), [make(a, b) for a, b in zip(LR, NORM, strict=True)]


MAKERS = {
    "sgd": lambda lr, norm: optim.sgd(lr, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda lr, norm: optim.adamw(lr, weight_decay=norm),
    "clipped": lambda lr, norm: optim.chain(optim.clip_by_global_norm(norm), optim.adamw(0.05)),
    "scheduled": lambda lr, norm: optim.chain(
        optim.clip_by_global_norm(0.5), optim.adamw(optim.warmup_cosine(lr, 2, 20 * norm))
    ),
    "constant": lambda lr, norm: optim.sgd(optim.constant(lr)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_members_are_a_loop_over_members(name):
    opt, singles = _population(MAKERS[name])
    members = [lora(seed=s) for s in range(3)]
    many = trained(opt, stack(members), members=3)
    for got, one, start in zip(unstack(many), singles, members, strict=True):
        assert_same(got, trained(one, start), **F64)


@pytest.mark.parametrize("name", MAKERS)
def test_vmap_of_update_is_the_state_per_member(name):
    opt, _ = _population(MAKERS[name])
    many = direct = stack([lora(seed=s) for s in range(3)])
    state = direct_state = opt.init(many)
    for _ in range(4):
        grads = torch.func.vmap(gradient, in_dims=(0, None))(many, X)[1]
        direct, direct_state = opt.update(grads, direct_state, direct)
        many, state = torch.func.vmap(opt.update)(grads, state, many)
    assert_same(many, direct, **F64)
    assert pytree.tree_structure(state) == pytree.tree_structure(direct_state)
    assert state.step.tolist() == [4, 4, 4]


def test_a_function_of_the_step_sees_a_0d_step_per_member():
    shapes = []

    def rate(step: Tensor) -> Tensor:
        shapes.append(step.ndim)
        return torch.stack([0.1 / (1 + step), torch.tensor(0.05, dtype=torch.float64)]).max()  # a reduction: not elementwise

    members = [lora(seed=s) for s in range(2)]
    many = trained(optim.sgd(rate), stack(members), members=2)
    for got, start in zip(unstack(many), members, strict=True):
        assert_same(got, trained(optim.sgd(rate), start), **F64)
    assert set(shapes) == {0}


def test_members_made_equal_by_count_have_their_own_norms():
    opt = optim.chain(optim.clip_by_global_norm(0.1), optim.sgd(1.0))
    members = [lora(seed=s) for s in range(3)]
    assert opt.init(stack(members), members=3).step.shape == (3,)
    for got, start in zip(unstack(trained(opt, stack(members), members=3)), members, strict=True):
        assert_same(got, trained(opt, start), **F64)


@pytest.mark.parametrize(
    "opt",
    [optim.adamw(0.05, weight_decay=0.1), optim.sgd(0.05, 0.9), optim.chain(optim.clip_by_global_norm(0.3), optim.adamw(0.1))],
)
def test_padded_ranks_stay_zero_and_change_nothing(opt):
    members = [lora(rank=r, seed=r) for r in (1, 3, 2)]
    many = trained(opt, stack(members), members=3)
    for i, rank in enumerate((1, 3, 2)):
        for leaves in many.params.values():
            assert leaves["A"][i, rank:].count_nonzero() == 0
            assert leaves["B"][i, :, rank:].count_nonzero() == 0
    for got, start in zip(unstack(many), members, strict=True):
        assert_same(got, trained(opt, start), **F64)


def test_a_tuple_of_adapters_is_one_adapter_in_parts():
    whole = lora()
    parts = tuple(Adapter({p: whole.params[p]}, {p: whole.consts[p]}) for p in ("up", "down"))

    def loss_of_parts(parts: tuple[Adapter, ...], x: Tensor) -> Tensor:
        first, second = parts
        return loss_fn(Adapter({**first.params, **second.params}, {**first.consts, **second.consts}), x)

    opt = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.1))
    state = opt.init(parts)
    for _ in range(3):
        parts, state = opt.update(value_and_grad(loss_of_parts)(parts, X)[1], state, parts)
    expected = trained(opt, whole, steps=3)
    assert isinstance(parts, tuple)
    assert_same(Adapter({**parts[0].params, **parts[1].params}), expected, **F64)


# -- what an update promises -------------------------------------------------------------------------------------------


def test_one_graph_serves_every_step_and_hyperparameter():
    opt = optim.chain(optim.clip_by_global_norm(torch.tensor([0.5, 2.0])), optim.adamw(optim.warmup_cosine(0.1, 2, 20)))
    start = stack([Adapter({"site": {"A": lora(seed=s).params["up"]["A"]}}) for s in range(2)])
    one = value_and_grad(lambda adapter, x: (x @ adapter.params["site"]["A"].mT).square().sum())

    def step(adapter, state):
        return opt.update(torch.func.vmap(one, in_dims=(0, None))(adapter, X)[1], state, adapter)

    def run(step):
        many, state = start, opt.init(start)
        for _ in range(4):
            many, state = step(many, state)
        hyper = {**state.hyper, "clip_by_global_norm": {"max_norm": torch.tensor([9.0, 0.1], dtype=torch.float64)}}
        return step(many, optim.State(state.step, hyper, state.memory))[0]

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(run(torch.compile(step, fullgraph=True, backend="aot_eager")), run(step), **F64)


@pytest.mark.parametrize("name", MAKERS)
def test_update_is_pure(name):
    opt, _ = _population(MAKERS[name])
    adapter = stack([lora(seed=s) for s in range(3)])
    state, grads = opt.init(adapter), tree_map(torch.sin, adapter.params)
    before = tree_map(torch.clone, (adapter, state, grads))
    new, after = opt.update(grads, state, adapter)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(before), tree_leaves((adapter, state, grads)), strict=True))
    given = {t.data_ptr() for t in tree_leaves((adapter, state, grads))}
    assert not given & {t.data_ptr() for t in tree_leaves((new.params, after.step, after.memory))}


def test_init_does_not_alias_the_hyperparameters():
    lr = torch.tensor([0.1, 0.2], dtype=torch.float64)
    state = optim.sgd(lr).init(stack([lora(), lora(seed=1)]))
    assert state.hyper["sgd"]["lr"].data_ptr() != lr.data_ptr()
    assert state.step.dtype == torch.int64
    assert {t.dtype for t in tree_leaves(state.hyper)} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_leaves_keep_their_dtype_and_have_float32_memory(dtype):
    adapter, opt = lora(dtype=dtype), optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.01))
    grads = tree_map(torch.sin, adapter.params)
    new, state = opt.update(grads, opt.init(adapter), adapter)
    wide = adapter.replace(params=tree_map(torch.Tensor.float, adapter.params))
    expected, _ = opt.update(tree_map(torch.Tensor.float, grads), opt.init(wide), wide)
    assert {t.dtype for t in tree_leaves(state.memory)} == {torch.float32}
    tree_map(lambda a, b: torch.testing.assert_close(a, b.to(dtype), rtol=0, atol=0), new.params, expected.params)


def test_updates_are_differentiable_where_gradients_are_zero():
    adapter = lora()
    adapter.params["up"]["B"].zero_()

    def after(lr: Tensor, params) -> Tensor:
        opt = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(lr))
        one = adapter.replace(params=params)
        for _ in range(2):
            grads = gradient(one, X)[1]
            one, _ = opt.update(grads, opt.init(one), one)
        return loss_fn(one, X)

    lr = torch.tensor(0.1, dtype=torch.float64)
    by_lr, by_params = torch.func.grad(after, argnums=(0, 1))(lr, adapter.params)
    assert all(t.isfinite().all() for t in tree_leaves((by_lr, by_params)))
    eps = 1e-6
    numeric = (after(lr + eps, adapter.params) - after(lr - eps, adapter.params)) / (2 * eps)
    torch.testing.assert_close(by_lr, numeric, rtol=1e-5, atol=1e-6)


def test_nan_gradients_are_not_hidden():
    adapter = lora()
    grads = tree_map(lambda t: torch.full_like(t, torch.nan), adapter.params)
    for opt in (optim.adamw(0.1), optim.sgd(0.1), optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1))):
        new, _ = opt.update(grads, opt.init(adapter), adapter)
        assert all(t.isnan().all() for t in tree_leaves(new.params))


def test_a_transform_of_ones_own_is_chained():
    def only_b(grads, memory, adapter, now):
        kept = {p: {n: g * (n == "B") for n, g in leaves.items()} for p, leaves in grads.items()}
        return kept, {"seen": tree_map(lambda s, g: s + optim.broadcast(now["step"], g) * g, memory["seen"], grads)}

    own = optim.Transform(name="only_b", hyper={}, rule=only_b, memory=("seen",))
    opt, adapter = optim.chain(own, optim.chain(own, optim.adamw(0.1, weight_decay=0))), lora()
    new, state = opt.update(adapter.params, opt.init(adapter), adapter)
    assert list(state.memory) == ["only_b", "only_b_2", "adamw"]
    assert torch.equal(new.params["up"]["A"], adapter.params["up"]["A"])
    assert not torch.equal(new.params["up"]["B"], adapter.params["up"]["B"])
    assert torch.equal(state.memory["only_b"]["seen"]["up"]["A"], adapter.params["up"]["A"])
    updates, _ = opt(adapter.params, opt.init(adapter), adapter)
    torch.testing.assert_close(adapter.params["up"]["B"] + updates["up"]["B"], new.params["up"]["B"])


# -- errors ------------------------------------------------------------------------------------------------------------

NAN = float("nan")
PAIR = torch.tensor([0.1, 0.2])


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: optim.sgd(NAN), ValueError, r"sgd: lr: must be in \[0, inf\), got nan"),
        (lambda: optim.sgd(-1e-3), ValueError, "got -0.001"),
        (lambda: optim.sgd(float("inf")), ValueError, "sgd: lr"),
        (lambda: optim.sgd(torch.tensor([0.1, -0.1])), ValueError, "sgd: lr"),
        (lambda: optim.sgd(0.1, momentum=-0.9), ValueError, "momentum"),
        (lambda: optim.sgd(0.1, weight_decay=NAN), ValueError, "weight_decay"),
        (lambda: optim.sgd(0.1, nesterov=True), ValueError, "nesterov needs a momentum"),
        (lambda: optim.sgd("0.1"), TypeError, "a number, an .* got str"),
        (lambda: optim.sgd(True), TypeError, "got bool"),
        (lambda: optim.sgd(torch.zeros(2, 2)), ValueError, r"got shape \(2, 2\)"),
        (lambda: optim.adamw(0.1, betas=(1.0, 0.9)), ValueError, r"beta1: must be in \[0, 1\)"),
        (lambda: optim.adamw(0.1, betas=(0.9, NAN)), ValueError, "beta2"),
        (lambda: optim.adamw(0.1, eps=0.0), ValueError, r"eps: must be in \(0, inf\)"),
        (lambda: optim.clip_by_global_norm(-1.0), ValueError, "max_norm"),
        (lambda: optim.cosine(NAN, 10), ValueError, "schedule: peak"),
        (lambda: optim.linear_warmup(0.1, -1), ValueError, "schedule: steps"),
        (lambda: optim.sgd(PAIR).init(lora()), ValueError, "leading axis of 2 members, got shape"),
        (
            lambda: optim.sgd(PAIR).init(stack([lora()] * 2), members=3),
            ValueError,
            r"must agree on N, at least 1, got \[2, 3\]",
        ),
        (
            lambda: optim.chain(optim.clip_by_global_norm(torch.ones(3)), optim.sgd(PAIR)).init(lora()),
            ValueError,
            "must agree on N",
        ),
        (lambda: optim.sgd(0.1).init(lora(), members=0), ValueError, "at least 1"),
        (lambda: optim.sgd(0.1).init({}), TypeError, "an Adapter or a tuple"),
        (
            lambda: trained(optim.sgd(lambda step: 0.1), lora()),
            TypeError,
            "sgd: lr: a schedule must return a 0-d tensor, got float",
        ),
        (lambda: trained(optim.clip_by_global_norm(1.0), lora()), ValueError, "must hold one optimizer such as sgd"),
        (lambda: trained(optim.chain(optim.sgd(0.1), optim.sgd(0.1)), lora()), ValueError, "must hold one optimizer"),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_errors_of_update():
    adapter, opt = lora(), optim.adamw(0.1)
    state, grads = opt.init(adapter), adapter.params
    with pytest.raises(TypeError, match=r"a State of .'adamw'. is required, got .'sgd'."):
        opt.update(grads, optim.sgd(0.1).init(adapter), adapter)
    with pytest.raises(TypeError, match=r"grads: paths, leaves and shapes .*'down', 'A'"):
        opt.update({"up": grads["up"]}, state, adapter)
    with pytest.raises(TypeError, match="grads: a tree of the form"):
        opt.update(adapter, state, adapter)
    with pytest.raises(TypeError, match="grads: a tree of the form"):
        opt.update((grads,), state, adapter)
    with pytest.raises(TypeError, match="m of the state: paths, leaves and shapes"):
        opt.update(grads, opt.init(lora(rank=2)), adapter)
