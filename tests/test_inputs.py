"""Inputs of populations: where members and rows are, what is shared, what a call may not write, and refusals."""

import copy
import functools
import warnings

import pytest
import torch
import torch.utils._pytree as pytree
import zoo
from herds import LIN, agree, leaves, population
from torch import nn

import funcpeft as fp
from funcpeft.methods import Full
from funcpeft.population import PopulationWarning
from funcpeft.stacking import members


class Net(nn.Module):
    """Takes a tensor, a dict of further ones, an offset that all rows share and a flag."""

    def __init__(self, rows=0):
        super().__init__()
        self.lin, self.rows = nn.Linear(6, 4), rows

    def forward(self, x, more=None, *, bias=None, shared=None, twice=False):
        y = self.lin(x if more is None else x + more["a"] * more["b"][0])
        y = y if bias is None else y + bias
        y = y if shared is None else y @ shared
        return 2 * y if twice else y


def net(n=3, rows=0):
    torch.manual_seed(0)
    return population(Net(rows).double(), members=n)


def x_(*shape, seed=0):
    return zoo.noise(*shape, seed=seed).double()


HOW = pytest.mark.parametrize("strategy", ["fold", "vmap", "loop"])


# -- axes --------------------------------------------------------------------------------------------------------------------


@HOW
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("rows", [1, 4])
def test_member_axes(n, rows, strategy):
    p, x = net(n), x_(n, rows, 6)
    wants = torch.stack([p.net(p.params, a, t) for a, t in zip(p.ads, x, strict=True)])
    for axis in (0, 1, 2, -1):
        moved = x.movedim(0, axis)
        for dims in (axis, ((axis,), {}), [[axis], {}]):
            agree(fp.apply_many(p.net, p.params, p.many, moved, in_dims=dims, strategy=strategy), wants)
    shared = fp.apply_many(p.net, p.params, p.many, x[0], in_dims=None, strategy=strategy)
    agree(shared, torch.stack([p.net(p.params, a, x[0]) for a in p.ads]))


@HOW
def test_trees_of_inputs(strategy):
    p, x = net(), x_(3, 4, 6)
    more = {"a": x_(4, 3, 6, seed=1), "b": (x_(4, 1, seed=2), "text")}
    kw = {"bias": x_(3, 4, 4, seed=3), "shared": x_(4, 4, seed=4), "twice": True}
    out = fp.apply_many(
        p.net,
        p.params,
        p.many,
        x,
        more,
        in_dims=((0, {"a": 1, "b": None}), {"shared": None}),
        batch_dims=(0, {"shared": None}),
        strategy=strategy,
        **kw,
    )
    for i, a in enumerate(p.ads):
        one = {"a": more["a"][:, i], "b": more["b"]}
        agree(out[i], p.net(p.params, a, x[i], one, bias=kw["bias"][i], shared=kw["shared"], twice=True))


@HOW
@pytest.mark.parametrize("shape", [(3, 1, 4), (3, 4, 4), (1, 4), (4, 4)])
def test_axes_of_size_one_are_broadcast(shape, strategy):
    p, x, bias = net(), x_(3, 4, 6), x_(*shape, seed=1)
    dims = ((0,), {"bias": 0 if len(shape) == 3 else None})
    out = fp.apply_many(p.net, p.params, p.many, x, bias=bias, in_dims=dims, strategy=strategy)
    for i, a in enumerate(p.ads):
        agree(out[i], p.net(p.params, a, x[i], bias=bias[i] if len(shape) == 3 else bias))


@HOW
@pytest.mark.parametrize("axis", [1, -2, 2])
def test_rows_elsewhere(axis, strategy):
    p, x = net(), x_(3, 5, 4, 6)
    dims = axis if axis != 2 else -2
    out = fp.apply_many(p.net, p.params, p.many, x, batch_dims=dims, strategy=strategy)
    for i, a in enumerate(p.ads):
        agree(out[i], p.net(p.params, a, x[i]))
    index, rows = torch.tensor([2, -1, 0, 2]), x[0]
    if strategy == "fold":
        out = fp.apply_routed(p.net, p.params, p.many, index, rows, batch_dims=1)
        for r, m in enumerate(index.tolist()):
            one = rows[:, r : r + 1]
            agree(out[:, r : r + 1], p.model(p.params, one) if m < 0 else p.net(p.params, p.ads[m], one))


def test_rows_elsewhere_are_looped_too():
    p, x, index = net(), x_(5, 4, 6), torch.tensor([2, -1, 0, 2])
    want = fp.apply_routed(p.net, p.params, p.many, index, x, batch_dims=1)
    agree(fp.apply_routed(p.net, p.params, p.many, index, x, batch_dims=1, strategy="loop"), want)


def test_a_member_of_inputs_without_rows_does_not_fold():
    p, x, shared = net(), x_(3, 2, 6), x_(3, 4, 4, seed=1)
    kw = {"shared": shared, "batch_dims": (0, {"shared": None})}
    with pytest.warns(PopulationWarning, match="input shared has members but no rows"):
        out = fp.apply_many(p.net, p.params, p.many, x, **kw)
    for i, a in enumerate(p.ads):
        agree(out[i], p.net(p.params, a, x[i], shared=shared[i]))
    with pytest.raises(ValueError, match="the members must fold, got input shared has members but no rows"):
        fp.apply_many(p.net, p.params, p.many, x, strategy="fold", **kw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_those_of_the_loop(dtype):
    torch.manual_seed(0)
    p, x = population(Net().to(dtype)), zoo.noise(3, 2, 6).to(dtype)
    out = fp.apply_many(p.net, p.params, p.many, x)
    for i, a in enumerate(p.ads):
        want = p.net(p.params, a, x[i])
        assert out.dtype == want.dtype == dtype
        agree(out[i], want, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("rows", [1, 2])
def test_small_batches(rows):
    p, x = net(), x_(3, rows, 6)
    assert fp.apply_many(p.net, p.params, p.many, x).shape == (3, rows, 4)
    index = torch.full((rows,), 2)
    agree(fp.apply_routed(p.net, p.params, p.many, index, x[2]), p.net(p.params, p.ads[2], x[2]))
    agree(fp.apply_routed(p.net, p.params, p.many, index - 3, x[2]), p.model(p.params, x[2]))


# -- refusals ----------------------------------------------------------------------------------------------------------------

PREFIX = r"must be a value for all or a tree prefix of \(args, kwargs\), got"
REFUSED = {
    "unknown keyword": ({"in_dims": ((0,), {"y": 0})}, TypeError, "apply_many: in_dims must name inputs of the call, got 'y'"),
    "dict alone": ({"in_dims": {"x": 0}}, TypeError, "apply_many: in_dims must name inputs of the call, got 'x'"),
    "one axis in a tuple": ({"in_dims": (0,)}, TypeError, f"apply_many: in_dims {PREFIX} tuple for tuple"),
    "deeper than the input": ({"in_dims": (((0, 1),), {})}, TypeError, f"in_dims {PREFIX} tuple for Tensor"),
    "a word": ({"in_dims": "x"}, TypeError, "in_dims of 0: must be an int or None, got str"),
    "a bool": ({"in_dims": True}, TypeError, "in_dims of 0: must be an int or None, got bool"),
    "a float": ({"batch_dims": 0.0}, TypeError, "batch_dims of 0: must be an int or None, got float"),
    "no such axis": ({"in_dims": 3}, ValueError, r"in_dims of 0: must be in \[-3, 3\), got 3"),
    "no such row axis": ({"batch_dims": 2}, ValueError, r"batch_dims of 0: must be in \[-2, 2\), got 2"),
    "no such axis from the end": ({"batch_dims": -3}, ValueError, r"batch_dims of 0: must be in \[-2, 2\), got -3"),
    "other members": ({"in_dims": 1}, ValueError, r"input 0: axis 1 must hold the 3 members, got shape \(3, 2, 6\)"),
    "no rows": ({"batch_dims": None}, ValueError, "an input must have rows; give batch_dims, None for what has no rows"),
    "other rows": ({"bias": torch.zeros(3, 5, 4)}, ValueError, r"as many in each, got {'0': 2, 'bias': 5}"),
    "strategy": (
        {"strategy": "fast"},
        ValueError,
        "apply_many: strategy must be one of 'auto', 'fold', 'vmap', 'loop', got 'fast'",
    ),
    "call": ({"call": "embed"}, ValueError, "apply_many: call must be one of 'forward', 'generate', got 'embed'"),
    "context": ({"context": 3}, TypeError, "apply_many: context must be a Context, got int"),
    "chunk of none": ({"chunk_size": 0}, ValueError, "chunk_size must be a positive integer, 'auto' or None, got 0"),
    "chunk of a bool": ({"chunk_size": True}, ValueError, "chunk_size must be a positive integer, 'auto' or None, got True"),
    "chunk by a word": ({"chunk_size": "all"}, ValueError, "chunk_size must be a positive integer, 'auto' or None, got 'all'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_inputs_are_refused(case):
    kw, kind, text = REFUSED[case]
    p = net()
    with pytest.raises(kind, match=text):
        fp.apply_many(p.net, p.params, p.many, x_(3, 2, 6), **kw)
    assert not p.net.plans  # nothing was called before


@pytest.mark.parametrize("shape", [(4,), (1,), (3, 1)])
def test_seeds_are_one_per_member(shape):
    p, context = net(), fp.Context(training=True, seed=torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"a seed tensor must be 0-d or \(3,\), one per member, got shape"):
        fp.apply_many(p.net, p.params, p.many, x_(3, 2, 6), context=context)
    with pytest.raises(ValueError, match=r"a seed tensor must be 0-d or \(3,\), one per member, got shape"):
        fp.apply_routed(p.net, p.params, p.many, [0, 1], x_(2, 6), context=context)


INDICES = {
    "short": ([0], ValueError, r"apply_routed: index must be \(2,\), one member per row, got \(1,\)"),
    "two axes": (torch.zeros(2, 1, dtype=torch.long), ValueError, r"index must be \(rows,\), one member per row, got \(2, 1\)"),
    "0-d": (torch.tensor(1), ValueError, r"index must be \(rows,\), one member per row, got \(\)"),
    "beyond": ([0, 3], ValueError, r"apply_routed: index must be in \[-1, 3\), got 3"),
    "below": ([-2, 0], ValueError, r"apply_routed: index must be in \[-1, 3\), got -2"),
    "float": (torch.zeros(2), TypeError, "apply_routed: index must hold integers, got torch.float32"),
    "bools": ([True, False], TypeError, "apply_routed: index must hold integers, got list"),
    "a word": ("ab", TypeError, "apply_routed: index must"),
    "nothing": (None, TypeError, "apply_routed: index must"),
    "a number": (1, TypeError, "apply_routed: index must"),
}


@pytest.mark.parametrize("case", INDICES)
def test_wrong_indices_are_refused(case):
    index, kind, text = INDICES[case]
    p = net()
    with pytest.raises(kind, match=text):
        fp.apply_routed(p.net, p.params, p.many, index, x_(2, 6))


def test_routed_calls_know_no_vmap():
    p = net()
    with pytest.raises(ValueError, match="strategy must be one of 'auto', 'fold', 'loop', got 'vmap'"):
        fp.apply_routed(p.net, p.params, p.many, [0, 1], x_(2, 6), strategy="vmap")


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (
            lambda p: p.ads[0],
            ValueError,
            "adapters: a stack is required, got leaves of unequal leading axes; stack the adapters with fp.stack",
        ),
        (lambda p: p.ads, TypeError, "adapters: a stack is required, got a list; stack them with fp.stack"),
        (lambda p: p.many.params, TypeError, "an Adapter or a tuple of them is required, got dict"),
        (lambda p: (p.many, p.many), TypeError, r"one Adapter for each of \(LoRA\) is required, got 2"),
        (lambda p: net_of("other").many, TypeError, "adapter for lora: paths must be the net's sites, got extra 'other'"),
        (
            lambda p: net_of("lin", "other").many,
            TypeError,
            "adapter for lora: paths must be the net's sites, got extra 'other'",
        ),
        (
            lambda p: net_of("lin", method=Full).many,
            TypeError,
            "paths must be the net's sites, got extra 'lin.bias', 'lin.weight'",
        ),
        (lambda p: net_of("lin", method=fp.IA3, feedforward_modules=[]).many, TypeError, "leaves must be those of lora"),
        (lambda p: without(p.many, "B"), TypeError, "adapter at 'lin': .*'B'"),
        (lambda p: without(p.many, "scaling"), TypeError, "adapter at 'lin': .*'scaling'"),
    ],
    ids=["member", "list", "params", "two", "other net", "more sites", "other leaves", "other method", "no B", "no scaling"],
)
def test_what_is_no_stack_for_the_net_is_refused(make, kind, text):
    p, x = net(), x_(3, 2, 6)
    for call in (lambda s: fp.apply_many(p.net, p.params, s, x), lambda s: fp.apply_routed(p.net, p.params, s, [0, 1], x[0])):
        with pytest.raises(kind, match=text):
            call(make(p))


def net_of(*names, method=fp.LoRA, **fields):
    module = nn.ModuleDict({name: nn.Linear(6, 4) for name in names}).double()
    return population(module, method(target_modules=list(names), **fields, **({"r": 2} if method is fp.LoRA else {})))


def without(stack, name):
    kept = lambda tree: {p: {n: t for n, t in v.items() if n != name} for p, v in tree.items()}  # noqa: E731
    return stack.replace(params=kept(stack.params), consts=kept(stack.consts))


def test_a_member_whose_leaves_all_have_one_length_is_no_stack():
    p = population(Net().double(), Full(target_modules=["lin"]))
    assert members(p.ads[0]) == 4
    with pytest.raises(TypeError, match=r"must have shape .*; stack the adapters"):
        fp.apply_many(p.net, p.params, p.ads[0], x_(2, 6), in_dims=None)


def test_a_model_is_no_net():
    p = net()
    for call in (fp.apply_many, fp.plan_many):
        with pytest.raises(TypeError, match="a Net is required first, got Model; make it with adapt"):
            call(p.model, p.params, p.many, x_(3, 2, 6))


# -- caches, and what a call may not write -----------------------------------------------------------------------------------


@functools.cache
def llama():
    return copy.deepcopy(zoo.model("llama")).double()


def cache(p, kind):
    from transformers import DynamicCache, StaticCache

    if kind == "static":
        made = StaticCache(config=p.model.config, max_cache_len=12)
        made.early_initialization(batch_size=2, num_heads=2, head_dim=8, dtype=torch.float64, device="cpu")
        return made
    made = DynamicCache(config=p.model.config)
    return made if kind == "empty" else p.model(p.params, input_ids=zoo.ids(2, 3), past_key_values=made).past_key_values


@HOW
@pytest.mark.parametrize("kind", ["static", "filled", "empty"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_caches_given_as_inputs_stay_as_they_are(own, n, kind, strategy):
    strategy = "auto" if kind == "static" else strategy  # torch does not vmap what writes it in place
    p, ids = population(llama(), fp.LoRA(r=2, target_modules=["q_proj", "v_proj"]), n), zoo.ids(2, 4)
    with torch.no_grad():
        given = cache(p, kind)
        wants = [p.net(p.params, a, input_ids=ids, past_key_values=copy.deepcopy(given)).logits for a in p.ads]
        if own:
            flat, spec = pytree.tree_flatten(given)
            given = pytree.tree_unflatten([torch.stack([t] * n) for t in flat], spec)
        before, length = [t.clone() for t in leaves(given)], given.get_seq_length()
        dims = {"input_ids": None, "past_key_values": 0 if own else None}
        kw = {"in_dims": ((), dims), "strategy": "auto" if strategy == "fold" else strategy}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PopulationWarning)
            out = fp.apply_many(p.net, p.params, p.many, input_ids=ids, past_key_values=given, **kw)
        agree(list(out.logits), wants)
    after = leaves(given)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert torch.equal(torch.as_tensor(given.get_seq_length()), torch.as_tensor(length))


class Writes(nn.Module):
    """Writes its input and its own attributes."""

    def __init__(self):
        super().__init__()
        self.lin, self.last, self.count = nn.Linear(6, 4), None, 0

    def forward(self, x):
        self.last, self.count = x, self.count + 1
        return self.lin(x) * self.count


@pytest.mark.parametrize("method", [LIN, Full(target_modules=["lin"])], ids=["site", "unit"])
def test_nothing_of_a_call_is_kept(method):
    torch.manual_seed(0)
    p, x = population(Writes().double(), method), x_(3, 2, 6)
    for strategy in ("fold", "loop", "fold"):
        out = fp.apply_many(p.net, p.params, p.many, x, strategy=strategy)
        fp.apply_routed(p.net, p.params, p.many, [0, 2], x[0])
        for i, a in enumerate(p.ads):
            agree(out[i], p.net(p.params, a, x[i]))
    for skeleton in (s for pool in p.model._pools.values() for s in pool):
        assert skeleton.module.last is None
        assert skeleton.module.count == 0
        assert all(holder[name] is None or holder[name].is_meta for holder, name, _ in skeleton.slots)
        assert all(b.expr is None for b in skeleton.bindings.values())
        assert all(not u.weights for u in skeleton.units)
