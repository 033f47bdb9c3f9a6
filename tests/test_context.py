"""Draws inside a call: rates, independence, and the same bits in every way of running it."""

import math

import pytest
import torch
from torch import nn

from funcpeft import rng
from funcpeft.adapt import adapt
from funcpeft.context import EVAL, Context
from funcpeft.functional import functionalize
from funcpeft.methods import LoRA
from funcpeft.stacking import stack
from funcpeft.tree import tree_map


class Mlp(nn.Module):
    """Meets ``lin`` twice."""

    def __init__(self):
        super().__init__()
        self.first, self.lin, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.last(self.lin(self.lin(self.first(x))))


def made(p=0.5, targets=("first", "lin", "last")):
    torch.manual_seed(0)
    model, params = functionalize(Mlp())
    net = adapt(model, LoRA(r=2, lora_dropout=p, target_modules=list(targets)))
    adapter = net.init(params, 0)
    return net, params, adapter.replace(params=tree_map(torch.ones_like, adapter.params))


def training(seed):
    return Context(training=True, seed=seed)


def mask(seed, shape=(1000,), salts=(), p=0.5):
    return rng.dropout(torch.ones(shape), p, rng.key(seed, *salts)) != 0


# -- the numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_p_and_the_mean_is_kept(p):
    n = 200_000
    kept = torch.cat([rng.dropout(torch.ones(n // 10), p, rng.key(seed, 3)) for seed in range(10)])
    assert abs(float((kept == 0).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1.0) / (1 - p))}
    assert abs(float(kept.double().mean()) - 1) < 5 * math.sqrt(p / (1 - p) / n)


def test_bits_are_uniform():
    drawn = rng.bits(rng.key(7), (1 << 16,), torch.device("cpu"))
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < 2**32
    for shift in range(0, 32, 4):  # every nibble, against chi squared with 15 degrees of freedom
        counts = torch.bincount((drawn >> shift) & 15, minlength=16).double()
        expected = len(drawn) / 16
        assert float(((counts - expected) ** 2 / expected).sum()) < 50
    for bit in range(32):
        assert abs(float(((drawn >> bit) & 1).double().mean()) - 0.5) < 5 / (2 * math.sqrt(len(drawn)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, ()), (2, ())),
        ((0, ()), (1 << 32, ())),
        ((0, ()), (1 << 62, ())),
        ((5, (1,)), (5, (2,))),
        ((5, (1, 2)), (5, (2, 1))),
        ((5, (0,)), (5, (0, 0))),
        ((-1, ()), (1, ())),
        ((2**63, ()), (0, ())),
    ],
    ids=str,
)
def test_masks_of_other_seeds_and_salts_are_independent(one, other):
    n = 20_000
    a, b = (mask(seed, (n,), salts).double() - 0.5 for seed, salts in (one, other))
    assert abs(float((a * b).mean()) * 4) < 5 / math.sqrt(n)
    for lag in (1, 2, 64):
        assert abs(float((a[lag:] * b[:-lag]).mean()) * 4) < 5 / math.sqrt(n)
        assert abs(float((a[lag:] * a[:-lag]).mean()) * 4) < 5 / math.sqrt(n)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1, -1, -(2**63)])
def test_an_int_and_a_tensor_give_the_same_bits(seed):
    shape = (64,)
    want = rng.bits(rng.key(seed, 5), shape, torch.device("cpu"))
    assert torch.equal(rng.bits(rng.key(torch.tensor(seed), 5), shape, torch.device("cpu")), want)
    if abs(seed) < 2**31:
        small = torch.tensor(seed, dtype=torch.int32)
        assert torch.equal(rng.bits(rng.key(small, 5), shape, torch.device("cpu")), want)


def test_the_edges_of_p():
    x = torch.arange(5.0)
    assert torch.equal(training(1).dropout(x, 0.0), x)
    assert not rng.dropout(x, 1.0, rng.key(1)).any()
    assert torch.equal(EVAL.dropout(x, 0.5), x)
    half = training(1).dropout(torch.ones(100, dtype=torch.bfloat16), 0.5)
    assert half.dtype == torch.bfloat16


# -- the context -------------------------------------------------------------------------------------------------------------


def test_what_is_no_seed_is_refused():
    with pytest.raises(ValueError, match="context: training needs a seed, got seed=None; pass Context"):
        Context(training=True)
    for seed in (1.5, "3", True, torch.tensor(2.0)):
        with pytest.raises(TypeError, match="context: seed must be an int or an integer tensor"):
            training(seed)
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="context: seed must have at most 64 bits"):
            training(seed)
    with pytest.raises(ValueError, match=r"a seed tensor must be 0-d in a call, got shape \(2,\); vmap over the context"):
        training(torch.tensor([1, 2])).dropout(torch.ones(2, 2), 0.5)


def test_sites_occurrences_and_entries_draw_apart():
    seen = {}

    class Spy(LoRA):
        def apply(self, leaves, base, x, context):
            seen.setdefault(base.path, []).append(tuple((context.dropout(torch.ones(200), 0.5) != 0).tolist()))
            return super().apply(leaves, base, x, context)

    model, params = functionalize(Mlp())
    spy = Spy(r=2, target_modules=["first", "lin", "last"])
    net = adapt(model, [spy, spy])
    net(params, net.init(params, 0), torch.ones(2, 6), context=training(1))
    masks = [m for found in seen.values() for m in found]
    assert {p: len(found) for p, found in seen.items()} == {"first": 2, "lin": 4, "last": 2}
    assert len(set(masks)) == len(masks) == 8


def test_a_sites_draw_does_not_depend_on_which_other_sites_there_are():
    net, params, adapter = made(targets=["last"])
    more, _, all_of_it = made()
    silent = all_of_it.replace(
        params={p: t if p == "last" else tree_map(torch.zeros_like, t) for p, t in all_of_it.params.items()}
    )
    x = torch.randn(4, 6)
    torch.testing.assert_close(net(params, adapter, x, context=training(3)), more(params, silent, x, context=training(3)))


def test_slots_are_apart():
    context, x = training(4), torch.ones(100)
    assert not torch.equal(context.dropout(x, 0.5, 0), context.dropout(x, 0.5, 1))


# -- ways of running ---------------------------------------------------------------------------------------------------------


def test_a_call_replays():
    net, params, adapter = made()
    x = torch.randn(4, 6)
    one, two, other = (net(params, adapter, x, context=training(s)) for s in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    torch.manual_seed(8)
    state = torch.get_rng_state()
    net(params, adapter, x, context=training(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpointed_call_replays_in_backward():
    from torch.utils.checkpoint import checkpoint

    net, params, adapter = made()
    x = torch.randn(4, 6)
    leaf = adapter.params["lin"]["A"].clone().requires_grad_(True)

    def call(a):
        p = {**adapter.params, "lin": {**adapter.params["lin"], "A": a}}
        return net(params, adapter.replace(params=p), x, context=training(3)).square().sum()

    plain = torch.autograd.grad(call(leaf), leaf)[0]
    again = torch.autograd.grad(checkpoint(call, leaf, use_reentrant=False, preserve_rng_state=False), leaf)[0]
    assert torch.equal(plain, again)


def test_members_of_a_vmap_draw_as_they_do_alone():
    net, params, adapter = made()
    x, seeds = torch.randn(4, 6), torch.tensor([3, 4, 2**40])
    many = stack([adapter] * 3)
    got = torch.func.vmap(lambda a, c: net(params, a, x, context=c))(many, Context(training=True, seed=seeds))
    for i, seed in enumerate(seeds.tolist()):
        torch.testing.assert_close(got[i], net(params, adapter, x, context=training(seed)))
    shared = torch.func.vmap(lambda a: net(params, a, x, context=training(3)))(many)
    torch.testing.assert_close(shared, got[:1].expand(3, -1, -1))


def test_a_compiled_call_draws_the_same_and_a_new_seed_needs_no_new_graph():
    net, params, adapter = made()
    x, graphs = torch.randn(4, 6), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    run = torch.compile(lambda c, x: net(params, adapter, x, context=c), fullgraph=True, backend=backend)
    for seed in (3, 4, 2**40):
        context = Context(training=True, seed=torch.tensor(seed))
        torch.testing.assert_close(run(context, x), net(params, adapter, x, context=training(seed)))
    assert len(graphs) == 1
    fixed = torch.compile(lambda x: net(params, adapter, x, context=training(3)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fixed(x), net(params, adapter, x, context=training(3)))


def test_a_context_is_a_node_whose_child_is_a_tensor_seed():
    import torch.utils._pytree as pytree

    leaves, spec = pytree.tree_flatten(Context(training=True, seed=torch.tensor(3)))
    assert [int(t) for t in leaves] == [3]
    assert int(pytree.tree_unflatten(leaves, spec).seed) == 3
    assert pytree.tree_leaves(pytree.tree_unflatten([0], spec)) == [0]  # what vmap does with its in_dims
    assert pytree.tree_leaves(training(3)) == []
    assert pytree.tree_map(lambda t: t, training(3)).seed == 3
