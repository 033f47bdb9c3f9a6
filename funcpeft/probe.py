"""The probe: whether the rows of many members may share one batch of a model, found by calling it.

The fold holds where rows stay one member's after the other and do not act on each other. A probe calls the net with one
member's rows, with twice as many, and folded with two members whose leaves are moved at random; shapes at every site tell
where rows are, and values whether they are independent. What a batch does beyond that (mixtures of experts that route
tokens, relative biases, batch statistics, contrastive logits, losses) is found without a list of models. Imports calls,
inputs, fold, stacking.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funcpeft import rng
from funcpeft.adapt import Net
from funcpeft.calls import call_folded, call_vmapped
from funcpeft.context import EVAL
from funcpeft.fold import FIRST, Layout, Places
from funcpeft.functional import Params
from funcpeft.inputs import Inputs, OutAxes, split_rows
from funcpeft.stacking import picked
from funcpeft.tree import Adapters, as_tuple, tree_map
from funcpeft.units import Place

#: By how much leaves are moved for a probe, so that members differ and methods that start at the identity act.
_NOISE = 0.1


@dataclass(frozen=True, eq=False)
class Plan:
    """How a population is called, and why.

    Attributes:
        strategy: ``"fold"``, ``"vmap"`` or ``"loop"``.
        reason: What the probe found against the strategies before it; empty for ``"fold"``.
        places: Where rows are at every site.
        outs: Axis of the rows of leaves of the output where it is not the first, ``None`` for what all rows share.
        compared: Whether values were compared; where a transform hides them, shapes alone were.
    """

    strategy: str
    reason: str = ""
    places: Places = FIRST
    outs: OutAxes = field(default_factory=dict)
    compared: bool = True

    def __str__(self) -> str:
        return f"{self.strategy}: {self.reason}" if self.reason else f"{self.strategy}: rows are independent"


#: What is taken where nothing was probed, as inside a trace.
UNPROBED = Plan("fold")


class Unfoldable(Exception):
    """The fold does not hold; the message says where."""


def probe(
    net: Net, params: Params, stacked: Adapters, inputs: Inputs, members: int, call: str, *, routed: bool = False
) -> Plan:
    """Finds out whether a population can be folded, by a few calls of the net with one and with two members' rows.

    With ``routed`` each row may be of another member, though ``inputs`` have no member axis.

    Returns:
        A plan with strategy ``"fold"`` and the places of the rows, or ``"vmap"`` or ``"loop"`` with the reason.

    Raises:
        Exception: What the net raises for these inputs with one member.
    """
    two = _moved(stacked, members)
    one = picked(two, [1])
    last = inputs.member(members - 1)
    b = inputs.rows
    with torch.no_grad():
        alone = _Record(net, params, call)
        want = alone.run([one], Layout(((1, b),)), last.unflat(last.leaves))
        read = Places(read=frozenset(alone.read))
        if alone.read:  # again, so that the modules that read run as units and are seen
            alone = _Record(net, params, call)
            alone.run([one], Layout(((1, b),)), last.unflat(last.leaves), read)
        first = inputs.member(0)
        pair = _paired(first, last)
        for name, members_axis, row in zip(inputs.names, inputs.member_axes, inputs.row_axes, strict=True):
            if members_axis is not None and row is None:
                return _vmap_or_loop(net, params, two, pair, call, want, f"input {name} has members but no rows")
        if (inputs.mapped or routed) and (path := _chosen_by_length(net)) is not None:
            reason = f"{path!r} chooses its frequencies by the longest row of a batch"
            return _vmap_or_loop(net, params, two, pair, call, want, reason)
        plan = _judged(net, params, two, _paired(_shifted(last), last), b, call, alone, read, want)
        if plan.strategy != "fold" and plan.reason.startswith(_CRASHED):
            return _judged(net, params, two, pair, b, call, alone, read, want)
        if plan.strategy == "fold" and inputs.mapped:  # the members' own inputs too
            wants = [_Record(net, params, call).run([picked(two, [0])], Layout(((1, b),)), first.unflat(first.leaves)), want]
            try:
                return _checked(net, params, two, pair, b, call, plan.places, plan.outs, wants)
            except Unfoldable as e:
                return _vmap_or_loop(net, params, two, pair, call, want, str(e))
        return plan


def _chosen_by_length(net: Net) -> str | None:
    """Returns the path of a rotary embedding of transformers that reads the largest position of the whole batch."""
    for path, m in net.model.modules():
        kinds = getattr(m, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                return path
    return None


#: How the reason begins where a call of the probe failed: inputs that were made up may have been to blame.
_CRASHED = "the call failed: "


def _judged(
    net: Net, params: Params, two: Any, both: Inputs, b: int, call: str, alone: _Record, read: Places, want: Any
) -> Plan:
    """Compares one member's own call with calls in which its rows stand after others."""
    try:
        pair = _Record(net, params, call)
        out = pair.run([picked(two, [1])], Layout(((1, 2 * b),)), both.folded(2), read)
        places = replace(alone.places(pair, b), read=read.read)
        return _checked(net, params, two, both, b, call, places, _out_axes(want, out, b), [None, want])
    except Unfoldable as e:
        reason = str(e)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as e:
        reason = f"{_CRASHED}{type(e).__name__}: {e}".splitlines()[0]
    return _vmap_or_loop(net, params, two, both, call, want, reason)


def _checked(
    net: Net, params: Params, two: Any, both: Inputs, b: int, call: str, places: Places, outs: Any, wants: Sequence[Any]
) -> Plan:
    """Calls two members folded, and compares their rows with calls of their own; modules that do not vmap are looped."""
    layout = Layout(((2, b),))

    def folded(where: Places) -> Any:
        return call_folded(net, params, [two], layout, both.folded(2), contexts=[EVAL], places=where, call=call)

    try:
        got = folded(places)
    except (RuntimeError, ValueError, TypeError, IndexError):
        if not any(isinstance(p, Place) for p in places.at.values()):
            raise
        looped = {path: replace(p, looped=True) if isinstance(p, Place) else p for path, p in places.at.items()}
        places = Places(looped, places.read)
        got = folded(places)
    compared = True
    for i, want in enumerate(wants):
        if want is None:
            continue
        one = functools.partial(_rows_of, layout, i)
        found = _difference(pytree.tree_leaves(split_rows(got, outs, layout.rows, one, "probe")), want)
        if found is not None and found != _HIDDEN:
            raise Unfoldable(f"rows act on each other: {found}")
        compared &= found is None
    return Plan("fold", "", places, outs, compared)


def _rows_of(layout: Layout, i: int, t: Tensor, axis: int | None) -> Tensor:
    """Returns one member's part of an output."""
    return t if axis is None else layout.cut(t, axis)[0].select(axis, i)


def _vmap_or_loop(net: Net, params: Params, two: Any, both: Inputs, call: str, want: Any, reason: str) -> Plan:
    if call != "forward":
        return Plan("loop", reason)
    try:
        got = call_vmapped(net, params, two, both, EVAL)
    except Exception as e:  # whatever a model does under vmap, a loop is left
        return Plan("loop", f"{reason}; under vmap {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
    halves = [t[1] if isinstance(t, Tensor) else t for t in pytree.tree_leaves(got)]
    if (leaf := _difference(halves, want)) not in (None, _HIDDEN):
        return Plan("loop", f"{reason}; under vmap {leaf}")
    return Plan("vmap", reason)


class _Record:
    """One call of a probe, and the shapes that it showed at every site."""

    def __init__(self, net: Net, params: Params, call: str) -> None:
        self.net, self.params, self.call_name = net, params, call
        self.seen: list[tuple[str, tuple[Any, ...], tuple[Any, ...] | None]] = []
        self.read: set[str] = set()

    def run(self, groups: Sequence[Adapters], layout: Layout, inputs: tuple[Any, Any], places: Places = FIRST) -> Any:
        def observe(path: str, given: Any, out: Any = None) -> None:
            if given is None:
                self.read.add(path)
                return
            leaves = (given,) if out is None else given
            self.seen.append((path, _shapes(leaves), None if out is None else _shapes(out)))

        return call_folded(self.net, self.params, groups, layout, inputs, contexts=[EVAL], call=self.call_name, observe=observe)

    def places(self, twice: _Record, rows: int) -> Places:
        """Finds, from a call with twice the rows, the axis of the rows at every site."""
        for (path, *_), (other, *_) in itertools.zip_longest(self.seen, twice.seen, fillvalue=("the end",)):
            if path != other:
                raise Unfoldable(f"sites are met by other rows: after as many meetings {path!r} is next, and {other!r}")
        at: dict[str, Any] = {}
        for (path, given, out), (_, given2, out2) in zip(self.seen, twice.seen, strict=True):
            axes = tuple(_axis(f"the input of {path!r}", a, b, rows) for a, b in zip(given, given2, strict=True))
            if out is None:
                if axes[0] is None:
                    raise Unfoldable(f"the input of {path!r} carries no rows: shape {given[0]}")
                place: Any = axes[0]
            else:
                outs = tuple(_axis(f"the output of {path!r}", a, b, rows) for a, b in zip(out, out2 or (), strict=True))
                place = Place(axes, outs)
            if at.setdefault(path, place) != place:
                raise Unfoldable(f"rows are on several axes at {path!r}")
        return Places({path: place for path, place in at.items() if place != 0}, frozenset(self.read))


def _shapes(leaves: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(t.shape) if isinstance(t, Tensor) else None for t in leaves)


def _axis(what: str, shape: Any, twice: Any, rows: int) -> int | None:
    """Returns the one axis that doubles with the rows, ``None`` if the shape stays."""
    if shape == twice:
        return None
    if shape is None or twice is None or len(shape) != len(twice):
        raise Unfoldable(f"{what} has another form with more rows: {shape}, then {twice}")
    odd = [i for i, (a, b) in enumerate(zip(shape, twice, strict=True)) if a != b]
    if len(odd) != 1 or twice[odd[0]] != 2 * shape[odd[0]] or shape[odd[0]] % rows:
        raise Unfoldable(f"{what} does not carry the rows: shape {shape} with {rows}, {twice} with {2 * rows}")
    return odd[0]


def _out_axes(one: Any, twice: Any, rows: int) -> OutAxes:
    a, b = (pytree.tree_flatten_with_path(t)[0] for t in (one, twice))
    if len(a) != len(b):
        raise Unfoldable("the output has another structure with more rows")
    axes: dict[str, int | None] = {}
    for (path, t), (_, u) in zip(a, b, strict=True):
        if not isinstance(t, Tensor) or not isinstance(u, Tensor):
            continue
        shape, twice_ = (tuple(x.shape[:1]) if _ids(x) else tuple(x.shape) for x in (t, u))  # ids end where they end
        axis = _axis(f"output {pytree.keystr(path)}", shape, twice_, rows)
        if axis is None and t.is_floating_point():  # a number that all rows share, such as the width of a window, is none
            raise Unfoldable(f"output {pytree.keystr(path)} carries no rows: shape {tuple(t.shape)}; take losses from logits")
        if axis != 0 and not (axis is None and not t.ndim):
            axes[pytree.keystr(path)] = axis
    return axes


def _ids(t: Tensor) -> bool:
    return t.ndim == 2 and not t.is_floating_point()


#: What ``_difference`` returns where a transform hides the values.
_HIDDEN = "hidden"


def _difference(got: Sequence[Any], want: Any) -> str | None:
    """Names the first leaf of an output that differs by more than rounding, ``None`` if there is none."""
    for t, (path, w) in zip(got, pytree.tree_flatten_with_path(want)[0], strict=False):
        differs = f"output {pytree.keystr(path)} of a member depends on the others"
        if not isinstance(w, Tensor) or not isinstance(t, Tensor):
            if isinstance(w, bool | int | float) and t != w and w == w:
                return differs
            continue
        if _ids(w):
            n = min(t.shape[1], w.shape[1])
            t, w = t[:, :n], w[:, :n]
        try:
            size = float(w.abs().max()) if w.numel() else 0.0
            if t.shape != w.shape or not torch.allclose(t, w, rtol=0, atol=_rounding(w.dtype) * size, equal_nan=True):
                return differs
        except RuntimeError:  # a transform hides the values; shapes have been compared
            return _HIDDEN
    return None


def _rounding(dtype: torch.dtype) -> float:
    """Returns what two batches of the same rows may differ by, relative to the largest output; deep models amplify it."""
    if not dtype.is_floating_point:
        return 0.0
    eps = torch.finfo(dtype).eps
    return 8 * eps if eps > 1e-5 else 8 * eps**0.5


def _moved(stacked: Adapters, members: int) -> Any:
    """Returns the first and the last member, their trained leaves moved at random."""
    two, count = picked(stacked, [0, members - 1]), 0

    def move(t: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return t.detach() + _NOISE * _noise(t, count)

    made = tuple(a.replace(params=tree_map(move, a.params)) for a in as_tuple(two))
    return made if isinstance(two, tuple) else made[0]


def _noise(t: Tensor, salt: int) -> Tensor:
    """Draws U(-1, 1) by a hash, as ``vmap`` refuses generators."""
    drawn = rng.bits(rng.key(0, salt), t.shape, t.device).to(torch.float64)
    return (drawn / 2**31 - 1).to(t.dtype)


def _shifted(inputs: Inputs) -> Inputs:
    """Returns other inputs of the same form: floats moved at random, ids shifted along the row and by one."""

    def shift(t: Any, salt: int) -> Any:
        if not isinstance(t, Tensor) or inputs.row_axes[salt] is None or not t.numel() or inputs.owned[salt]:
            return t
        if t.is_floating_point():
            return t + 4 * (t.detach().abs().mean() + _NOISE) * _noise(t, salt)
        return t if t.dtype == torch.bool else (t.roll(1, -1) + 1) % (t.max() + 1)

    return replace(inputs, leaves=tuple(shift(t, i) for i, t in enumerate(inputs.leaves)))


def _paired(first: Inputs, last: Inputs) -> Inputs:
    """Returns the inputs of two members."""
    pairs = list(zip(first.leaves, last.leaves, strict=True))
    own = [isinstance(a, Tensor) and a is not b for a, b in pairs]
    leaves = [torch.stack([a, b]) if o else a for (a, b), o in zip(pairs, own, strict=True)]
    axes = [0 if o else None for o in own]
    return replace(first, leaves=tuple(leaves), member_axes=tuple(axes))
