"""The laws: what every method must satisfy, one documented function each.

A law takes a ``Case`` and raises ``AssertionError`` with the numbers if the case breaks it; it returns at once where it does
not apply (no merged form, not additive). Usable by anyone on their own method: ``funcpeft.testing.check_method`` runs all
of them. A law that cannot hold is waived in the method's class with the reason (``Method.waived``). Imports cases.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from funcpeft.adapt import adapt
from funcpeft.errors import NoMergedFormError
from funcpeft.interop.peft import load_peft, save_peft
from funcpeft.population import apply_many, plan_many
from funcpeft.routing import apply_routed
from funcpeft.stacking import stack, unstack
from funcpeft.testing.cases import Built, Case, close, distance, loss, outputs, same_bits
from funcpeft.tree import Adapter, as_tuple, tree_map
from funcpeft.weights import Adapted, Site, dense, meet, wide

Law = Callable[[Case], None]


def _agree(law: str, case: Case, got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float) -> None:
    for g, w in zip(got, want, strict=True):
        assert close(g, w, tolerance), f"{law}: differs by {distance(g, w):.3g}, allowed {tolerance:.3g}, at {case}"


def identity(case: Case) -> None:
    """A freshly initialised adapter changes nothing, to the float32 in which leaves are drawn, for methods that say so."""
    b = case.built()
    if case.method.neutral:
        drawn = torch.float32 if torch.finfo(case.dtype).eps < torch.finfo(torch.float32).eps else case.dtype
        _agree("identity", case, b.out(b.fresh()), b.base_out(), b.tolerance(dtype=drawn))


def merge(case: Case) -> None:
    """The adapted model equals the base model on merged weights and biases, and the report's bound is finite."""
    b = case.built()
    if not b.merges:
        try:
            b.net.merge(b.params, b.adapter())
        except NoMergedFormError:
            return
        raise AssertionError(f"merge: where there is no merged form it must be refused, at {case}")
    adapter = b.adapter()
    merged, report = b.net.merge(b.params, adapter)
    _agree("merge", case, b.out(adapter), b.base_out(merged), b.tolerance(merged))
    assert all(torch.isfinite(t) for row in report.sites.values() for t in row.values()), f"merge: report not finite, at {case}"


def unmerge(case: Case) -> None:
    """Unmerging after merging restores weights and biases within a bound computed from their sizes and the method's gain."""
    b = case.built()
    if not (b.merges and case.method.unmerges):
        return
    adapter = b.adapter()
    merged, _ = b.net.merge(b.params, adapter)
    restored = b.net.unmerge(merged, adapter)
    gain = max(_gains(b, adapter))
    for key, w in b.dense.items():
        if w.is_floating_point():
            size = float(dense(merged[key]).detach().double().abs().max() + w.double().abs().max()) if w.numel() else 0.0
            # two roundings to the base's dtype, and the leaves' own (float32 at most) in the inverse
            eps = max(torch.finfo(w.dtype).eps, torch.finfo(wide(w).dtype).eps * max(w.shape))
            allowed = 16 * gain * eps * size
            back = dense(restored[key])
            assert close(back, w, allowed), (
                f"unmerge: {key} differs by {distance(back, w):.3g}, allowed {allowed:.3g}, at {case}"
            )


def _gains(b: Built, adapter: Adapter) -> list[float]:
    found = [1.0]
    for entry, one in zip(b.net.entries, as_tuple(adapter), strict=True):
        for path, base in b.net.bases(entry, b.params).items():
            shared = [one.leaves(s) for s in entry.scopes.get(path, ())]
            leaves = {k: v for tree in (*shared, one.leaves(path)) for k, v in tree.items()}
            found.append(float(entry.method.unmerge_gain(leaves, base)))
    return found


def purity(case: Case) -> None:
    """Arguments are bitwise unchanged by init, apply, merge and unmerge, and nothing made aliases an argument."""
    b = case.built()
    adapter = b.adapter()
    held = (b.params, adapter.params, adapter.consts, {"x": b.x})
    before = tree_map(torch.clone, held)
    fresh = b.fresh()
    b.out(adapter)
    made = [*pytree.tree_leaves((fresh.params, fresh.consts))]
    if b.merges:
        merged, _ = b.net.merge(b.params, adapter)
        made += [t for k, t in merged.items() if t is not b.params.get(k) and k not in b.model.ties]
        if case.method.unmerges:
            b.net.unmerge(merged, adapter)
    assert same_bits(before, held), f"purity: an argument was changed, at {case}"
    owned = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(held) if t.numel()}
    aliases = [t.shape for t in made if t.numel() and t.untyped_storage().data_ptr() in owned]
    assert not aliases, f"purity: results of shapes {aliases} alias an argument, at {case}"


def kind(case: Case) -> None:
    """Shape, dtype and device of the output are the base's; the adapter's structure does not depend on the seed."""
    b = case.built()
    for got, want in zip(b.out(b.adapter()), b.base_out(), strict=True):
        assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device), (
            f"kind: {tuple(got.shape)} {got.dtype} instead of {tuple(want.shape)} {want.dtype}, at {case}"
        )
    shapes = [tree_map(lambda t: (tuple(t.shape), t.dtype), (a.params, a.consts)) for a in (b.fresh(0), b.fresh(1))]
    assert shapes[0] == shapes[1], f"kind: the structure depends on the seed, at {case}"
    for leaves in b.fresh().params.values():
        for name, t in leaves.items():
            assert t.dtype == torch.promote_types(case.dtype, torch.float32), f"kind: leaf {name} is {t.dtype}, at {case}"


def seed(case: Case) -> None:
    """Equal seeds give equal bits; sites draw independently, and adding a site changes no other site's draw."""
    b = case.built()
    one, again, other = b.fresh(3), b.fresh(3), b.fresh(4)
    assert same_bits((one.params, one.consts), (again.params, again.consts)), f"seed: equal seeds differ, at {case}"
    sites = [s for s in one.params if s]
    for name in one.params[sites[0]] if len(sites) == 2 else ():
        first, second = (one.params[s].get(name) for s in sites)
        drawn = not torch.equal(first, other.params[sites[0]][name])
        if drawn and second is not None and first.shape == second.shape and first.numel() > 3:
            assert not torch.equal(first, second), f"seed: two sites drew the same {name}, at {case}"
    if not case.method.depends_on_sites and case.kind != "call":
        alone = b.init(adapt(b.model, case.targeted("first")), 3)
        for path, leaves in alone.params.items():
            assert same_bits(leaves, one.params[path]), f"seed: a further site changed the draw at {path!r}, at {case}"


def stacking(case: Case) -> None:
    """``unstack`` of ``stack`` is the identity, bit for bit."""
    b = case.built()
    members = [b.adapter(i) for i in range(3)]
    for member, back in zip(members, unstack(stack(members)), strict=True):
        assert same_bits((member.params, member.consts), (back.params, back.consts)), f"stacking: a member changed, at {case}"


def vmap(case: Case) -> None:
    """``vmap`` over stacked adapters equals a loop over them: outputs, merged weights and gradients."""
    b = case.built()
    members = [b.adapter(i) for i in range(3)]
    many = stack(members)
    tolerance = b.tolerance()
    got = torch.func.vmap(lambda a: b.out(a))(many)
    for i, member in enumerate(members):
        _agree("vmap", case, tuple(g[i] for g in got), b.out(member), tolerance * _size(b.out(member)))
    if b.merges:
        merged = torch.func.vmap(lambda a: b.net.merge(b.params, a)[0], out_dims=0)(many)
        for i, member in enumerate(members):
            alone, _ = b.net.merge(b.params, member)
            for key in (k for k, v in alone.items() if isinstance(v, Tensor)):
                assert close(merged[key][i], alone[key], tolerance * _size((alone[key],))), (
                    f"vmap: merged {key} differs, at {case}"
                )
    grads = torch.func.vmap(lambda a: _grad(b, a))(many)
    for i, member in enumerate(members):
        alone = _grad(b, member)
        for g, w in zip(pytree.tree_leaves(grads), pytree.tree_leaves(alone), strict=True):
            allowed = tolerance * 100 * (_size((w,)) + _size(b.out(member)) ** 2)
            assert close(g[i], w, allowed), (
                f"vmap: a gradient differs by {distance(g[i], w):.3g}, allowed {allowed:.3g}, at {case}"
            )


def many(case: Case) -> None:
    """``apply_many`` and ``apply_routed`` equal a loop over members, by value and by gradient.

    Routing is refused for methods that say that they mix the rows of a call.
    """
    b = case.built()
    members = [b.adapter(i) for i in range(3)]
    stacked, shared = stack(members), {"in_dims": None, "context": b.context(), **b.options()}
    plan = plan_many(b.net, b.params, stacked, b.x, **shared)
    assert plan.strategy == "fold", f"many: {plan}, at {case}"

    def together(stacked: Adapter) -> tuple[Tensor, ...]:
        return outputs(apply_many(b.net, b.params, stacked, b.x, **shared))

    got, alone = together(stacked), [b.out(m) for m in members]
    for i, want in enumerate(alone):
        _agree("many", case, tuple(g[i] for g in got), want, b.tolerance() * _size(want))

    def total(params: Any) -> Any:
        outs = together(stacked.replace(params=params))
        return sum(loss(tuple(o[i] for o in outs)) for i in range(3))

    grads = torch.func.grad(total)(stacked.params)
    for i, member in enumerate(members):
        for g, w in zip(pytree.tree_leaves(grads), pytree.tree_leaves(_grad(b, member)), strict=True):
            allowed = b.tolerance() * 100 * (_size((w,)) + _size(alone[i]) ** 2)
            assert close(g[i], w, allowed), f"many: a gradient differs by {distance(g[i], w):.3g}, at {case}"
    _routed(case, b, stacked, alone, plan.outs)


def _routed(case: Case, b: Built, stacked: Adapter, alone: list[tuple[Tensor, ...]], outs: Any) -> None:
    rows = b.x.shape[0]
    if case.method.mixes_rows:
        try:
            apply_routed(b.net, b.params, stacked, [0] * rows, b.x, context=b.context(), **b.options())
        except ValueError:
            return
        raise AssertionError(f"many: a method that mixes rows must not be routed, at {case}")
    index = [(2, -1, 0, 2, 1)[i % 5] for i in range(rows)]
    prompts = case.method.wraps and any(o.shape != w.shape for o, w in zip(alone[0], b.base_out(), strict=True))
    index = [abs(i) for i in index] if prompts else index  # a row with a prompt has more positions than one without
    got = outputs(apply_routed(b.net, b.params, stacked, index, b.x, context=b.context(), **b.options()))
    axis = next(iter(outs.values()), 0) or 0
    for row, m in enumerate(index):
        whole = b.base_out() if m < 0 else alone[m]
        want = tuple(t.narrow(axis, row, 1) for t in whole)
        _agree("many", case, tuple(t.narrow(axis, row, 1) for t in got), want, b.tolerance() * _size(want))


def _size(tensors: tuple[Tensor, ...]) -> float:
    return 1 + max((float(t.detach().double().abs().max()) for t in tensors if t.numel()), default=0.0)


def _grad(b: Built, adapter: Adapter, **kwargs: Any) -> Any:
    return torch.func.grad(lambda p: loss(b.out(adapter.replace(params=p), **kwargs)))(adapter.params)


def grad(case: Case) -> None:
    """Gradients are finite, and at init at least one leaf gets one that is not zero."""
    b = case.built()
    for adapter, must_reach in ((b.adapter(), False), (b.fresh(), True)):
        leaves = pytree.tree_leaves(_grad(b, adapter))
        assert all(bool(torch.isfinite(t).all()) for t in leaves), f"grad: not finite, at {case}"
        leaves = [t for t in leaves if t.numel()]
        assert not must_reach or not leaves or any(bool((t != 0).any()) for t in leaves), (
            f"grad: reaches no leaf at init, at {case}"
        )


def derivative(case: Case) -> None:
    """In float64 the derivatives by every trained leaf and by the input agree with finite differences."""
    b = case.built()
    if case.dtype != torch.float64:
        return
    adapter = b.adapter()
    leaves, spec = pytree.tree_flatten(adapter.params)
    held = [b.x] if b.x.is_floating_point() else []
    given = [t.detach().clone().requires_grad_() for t in (*held, *leaves)]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        x = given[0] if held else b.x
        return b.out(adapter.replace(params=pytree.tree_unflatten(list(given[len(held) :]), spec)), x=x)

    try:
        gradcheck(function, given, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True)
    except GradcheckError as e:
        raise AssertionError(f"derivative: {str(e).splitlines()[0]}, at {case}") from e


@dataclass(frozen=True, eq=False)
class _Met:
    """A weight that an input may meet, and that nothing may read."""

    weight: Any

    shape = property(lambda self: self.weight.shape)
    dtype = property(lambda self: self.weight.dtype)
    device = property(lambda self: self.weight.device)

    def meet(self, site: Site, bias: Any, x: Tensor, occurrence: int) -> Tensor:
        return meet(self.weight, site, bias, x, occurrence)


def lean(case: Case) -> None:
    """A method that says its ``apply`` avoids the dense base weight computes the same where nothing can read that weight."""
    b = case.built()
    if not (case.method.sited and case.method.lean(case.kind)):
        return
    adapter, context = b.adapter(), b.context()
    attached = b.net.attach(b.params, adapter, context)
    hidden = {k: replace(v, base=_Met(v.base)) for k, v in attached.items() if isinstance(v, Adapted) and v.site.met}
    try:
        got = b.net.call_attached("forward", attached | hidden, adapter, (b.x,), b.options(), context.values)
    except TypeError as e:
        raise AssertionError(f"lean: the base's weight was read, at {case}") from e
    _agree("lean", case, outputs(got), b.out(adapter), b.tolerance() * _size(b.out(adapter)))


def compiled(case: Case) -> None:
    """``torch.compile(fullgraph=True)`` equals eager, for the output and the gradient."""
    b = case.built()
    adapter = b.adapter()
    torch.compiler.reset()
    run = torch.compile(b.out, fullgraph=True, backend="aot_eager")
    _agree("compiled", case, run(adapter), b.out(adapter), b.tolerance() * _size(b.out(adapter)))


def round_trip(case: Case) -> None:
    """Config to JSON and back is the identity, and so is an adapter saved to a file and loaded, bit for bit.

    Where the file holds a function of the leaves (an evaluated projection), the outputs are equal bit for bit. What a
    method's files do not hold (``Method.file_needs``) is given again.
    """
    b = case.built()
    method = b.net.methods[0]
    data = json.loads(json.dumps(method.to_dict()))
    assert type(method).from_dict(data) == method, f"round trip: the config changed, at {case}"
    assert hash(type(method).from_dict(data)) == hash(method), f"round trip: the hash changed, at {case}"
    if not method.peft_type:
        return
    adapter = b.adapter()
    with tempfile.TemporaryDirectory() as folder:
        save_peft(b.net, adapter, folder)
        net, back = load_peft(b.model, b.params, folder, **b.file_needs())
    for got, want in zip(outputs(net(b.params, back, b.x, context=b.context(), **b.options())), b.out(adapter), strict=True):
        assert torch.equal(got, want), f"round trip: the output changed by {distance(got, want):.3g}, at {case}"
    if {p: set(v) for p, v in back.params.items()} == {p: set(v) for p, v in adapter.params.items()}:
        assert same_bits(back.params, adapter.params), f"round trip: the leaves changed, at {case}"


def add(case: Case) -> None:
    """For additive methods, merging one adapter after another equals adding both updates."""
    b = case.built()
    if not (case.method.additive and b.merges):
        return
    one, two = b.adapter(0), b.adapter(1)
    first, _ = b.net.merge(b.params, one, dtype=torch.float64)
    second, _ = b.net.merge(b.params, two, dtype=torch.float64)
    both, _ = b.net.merge(first, two, dtype=torch.float64)
    for key, w in b.dense.items():
        if w.is_floating_point():
            left, right, sum_ = (dense(m[key]) for m in (first, second, both))
            want = left.double() + right.double() - w.double()
            allowed = 64 * torch.finfo(torch.float64).eps * _size((left, right))
            assert close(sum_, want, allowed), f"add: {key} differs by {distance(sum_, want):.3g}, at {case}"


def nest(case: Case) -> None:
    """Two methods at the same sites equal applying one after the other: the second sees the first's merged weights."""
    b = case.built()
    if not b.merges:
        return
    one, two = b.adapter(0), b.adapter(1)
    net = adapt(b.model, [case.targeted(), case.targeted()])
    step, _ = b.net.merge(b.params, one)
    after, _ = b.net.merge(step, two)
    both, _ = net.merge(b.params, (one, two))
    tolerance = b.tolerance(step, after)
    _agree("nest", case, b.base_out(both), b.base_out(after), 4 * tolerance)
    got = outputs(net(b.params, (one, two), b.x, context=b.context(), **b.options()))
    _agree("nest", case, got, b.base_out(both), 4 * tolerance)


def replay(case: Case) -> None:
    """A training call is determined by its seed: equal seeds give equal bits, also member by member under ``vmap``."""
    b = case.built()
    members = [b.adapter(i) for i in range(2)]
    context = b.context(training=True, seed=11)
    once, again = (b.out(members[0], context=context) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True)), f"replay: equal seeds differ, at {case}"
    seeds = torch.tensor([11, 12])
    got = torch.func.vmap(lambda a, s: b.out(a, context=b.context(training=True, seed=s)))(stack(members), seeds)
    for i, member in enumerate(members):
        want = b.out(member, context=b.context(training=True, seed=int(seeds[i])))
        _agree("replay", case, tuple(g[i] for g in got), want, b.tolerance() * _size(want))


def model(case: Case) -> None:
    """``functionalize`` then call equals the module, bit for bit; the module's state is bitwise untouched.

    On stored weights: the call equals that on the weights they decode to.
    """
    module = case.module().eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    b = case.built()
    with torch.no_grad():
        want = outputs(module(case.input(), **b.options())) if case.format is None else b.base_out(b.dense)
        got = b.base_out(dict(b.params))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), f"model: the function is not the module, at {case}"
    assert same_bits(before, dict(module.state_dict())), f"model: the module was changed, at {case}"


#: Every law by name, in the order in which a new method is best brought to satisfy them.
LAWS: dict[str, Law] = {
    "identity": identity,
    "merge": merge,
    "unmerge": unmerge,
    "purity": purity,
    "kind": kind,
    "seed": seed,
    "stacking": stacking,
    "vmap": vmap,
    "many": many,
    "grad": grad,
    "derivative": derivative,
    "lean": lean,
    "compiled": compiled,
    "round_trip": round_trip,
    "add": add,
    "nest": nest,
    "replay": replay,
    "model": model,
}
