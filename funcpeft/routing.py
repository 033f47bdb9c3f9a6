"""A member of a population for each row of a batch: ``apply_routed``.

Rows are sorted by member into groups of members with equally many, which the fold takes as they are: no row is padded, and a
group's leaves meet its rows in one batched product. Imports population, probe, inputs, fold, stacking.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funcpeft import errors
from funcpeft.adapt import Net
from funcpeft.calls import call_folded
from funcpeft.context import EVAL, Context, as_inputs, from_inputs
from funcpeft.entries import require_values
from funcpeft.fold import Layout
from funcpeft.functional import Params
from funcpeft.inputs import Inputs, evened, inputs_of, joined, split_rows
from funcpeft.population import checked_members, padding, plan_of, seed_of, seeds_of, short
from funcpeft.probe import Plan
from funcpeft.stacking import member, picked
from funcpeft.tree import Adapters

_STRATEGIES = ("auto", "fold", "loop")


def apply_routed(
    net: Net,
    params: Params,
    stacked: Adapters,
    index: Tensor | Sequence[int],
    /,
    *args: Any,
    batch_dims: Any = 0,
    strategy: str = "auto",
    call: str = "forward",
    context: Context = EVAL,
    **kwargs: Any,
) -> Any:
    """Calls a net with a member of a stack for each row of the batch.

    Rows are sorted by member, so that each member's leaves meet its rows together, however few or many they are.

    Args:
        net: The net.
        params: The base's leaves.
        stacked: What ``fp.stack`` made of N adapters; ranks may differ.
        index: ``(rows,)`` integers: row i uses member ``index[i]``, -1 is the bare base. Any order; members may come
            several times or not at all. Where its values cannot be read (inside ``torch.compile``) every row takes leaves of
            its own, draws as the one row of its member, and is computed without them too; values are not checked there.
        args: The model's positional inputs.
        batch_dims: Axis of the rows: a value for all inputs, or a tree prefix of ``(args, kwargs)``.
        strategy: ``"fold"``, ``"loop"``, or ``"auto"``: the fold where it is right, else the loop, with a warning.
        call: Method of the module: ``"forward"`` or ``"generate"``.
        context: Training flag and seed; a seed tensor ``(N,)`` is one per member.
        kwargs: The model's keyword inputs.

    Returns:
        What the model returns, rows in the order of the inputs.

    Raises:
        ValueError: If ``index`` has another length than the batch, or a value outside of [-1, N), or what a method of the net
            computes for a row depends on the other rows; else as ``apply_many``.
        TypeError: If ``index`` does not hold integers; else as ``apply_many``.
    """
    n = checked_members("apply_routed", net, stacked, strategy, call, context, _STRATEGIES)
    for method in net.methods:
        if method.mixes_rows:
            rule, remedy = (
                "rows can be routed where a method computes each by itself",
                "give every member its batch: apply_many",
            )
            raise ValueError(errors.say("apply_routed", rule, type(method).__name__, remedy))
    require_values(net.methods, context)
    context, values = as_inputs(context)
    kwargs = {**kwargs, **values}
    index = _integers(index)
    read = functools.partial(inputs_of, "apply_routed", in_dims=None, batch_dims=batch_dims, members=None)
    inputs = read(args, kwargs)
    known = _checked(index, n, inputs.rows)
    plan = plan_of("apply_routed", net, params, stacked, inputs, n, call, strategy, lambda: read(args, short(call, kwargs)))
    one = _Call(net, params, stacked, inputs, plan, call, context)
    if plan.strategy != "fold":
        return one.looped(known)
    return one.by_row(index) if known is None else one.sorted(known, index.device)


@dataclass(frozen=True)
class _Routes:
    """Rows sorted so that each member's are together, and members with as many rows too."""

    order: list[int]
    layout: Layout
    members: list[tuple[int, ...]]


def _route(index: Sequence[int], *, whole: bool) -> _Routes:
    """Sorts rows into groups of members with equally many.

    Where more than a few counts differ, a member's rows are cut into powers of two, so that there are at most
    ``log2(rows)`` groups; ``whole`` keeps them together, as draws of a training call depend on their number.
    """
    at: dict[int, list[int]] = {}
    for row, m in enumerate(index):
        at.setdefault(m, []).append(row)
    rest = at.pop(-1, [])
    pieces = [(m, rows) for m, rows in at.items()]
    exact = Counter(len(rows) for _, rows in pieces)
    powers = {bit for _, rows in pieces for bit in _powers(len(rows))}
    if not whole and len(powers) < len(exact):
        pieces = [(m, part) for m, rows in pieces for part in _cut(rows)]
    sizes = sorted({len(rows) for _, rows in pieces}, reverse=True)
    grouped = [sorted((m, rows) for m, rows in pieces if len(rows) == size) for size in sizes]
    order = [row for group in grouped for _, rows in group for row in rows] + rest
    layout = Layout(tuple((len(g), s) for g, s in zip(grouped, sizes, strict=True)), len(rest))
    return _Routes(order, layout, [tuple(m for m, _ in g) for g in grouped])


def _powers(count: int) -> Iterable[int]:
    return (1 << i for i in range(count.bit_length()) if count >> i & 1)


def _cut(rows: list[int]) -> Iterable[list[int]]:
    start = 0
    for size in _powers(len(rows)):
        yield rows[start : start + size]
        start += size


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a net whose rows are of several members."""

    net: Net
    params: Params
    stacked: Adapters
    inputs: Inputs
    plan: Plan
    call: str
    context: Context

    def sorted(self, index: Sequence[int], device: torch.device) -> Any:
        """Folds the members' rows, sorted."""
        routes = _route(index, whole=self.context.training)
        order = torch.tensor(routes.order, device=device)
        groups = [picked(self.stacked, list(m)) for m in routes.members]
        contexts = [seeds_of(self.context, torch.tensor(m)) for m in routes.members]
        rows, rest = self.inputs.rows, routes.layout.rest
        if self._wraps and 0 < rest < rows:  # a call with prompts and one without
            layout = replace(routes.layout, rest=0)
            first = self._folded(groups, contexts, layout, self.inputs.picked(order[: rows - rest]))
            out = self._beside(first, self._bare(self.inputs.picked(order[rows - rest :])))
        else:
            out = self._folded(groups, contexts, routes.layout, self.inputs.picked(order))
        back = torch.argsort(order)

        def put(t: Tensor, axis: int | None) -> Tensor:
            return t if axis is None else _reordered(t, axis, back, rows)

        return split_rows(out, self.plan.outs, rows, put, "apply_routed")

    def by_row(self, index: Tensor) -> Any:
        """Gives every row leaves of its own, where the values of ``index`` are not known, and bare rows the bare output."""
        if self._wraps:
            rule, remedy = "with methods that wrap the call the values of index must be known", "call it outside of a trace"
            raise ValueError(errors.say("apply_routed", rule, None, remedy))
        rows, taken, bare = index.shape[0], index.clamp(min=0), index < 0
        group, context = picked(self.stacked, taken), seeds_of(self.context, taken)
        given = self.inputs.unflat(self.inputs.leaves)
        out = self._folded([group], [context], Layout(((rows, 1),)), given)
        others = iter(pytree.tree_leaves(self._bare(given)))

        def put(t: Tensor, axis: int | None) -> Tensor:
            other = next(o for o in others if isinstance(o, Tensor))
            if axis is None:
                return t
            mask = bare.repeat_interleave(t.shape[axis] // rows) if t.shape[axis] != rows else bare
            return torch.where(mask.reshape([-1 if i == axis else 1 for i in range(t.ndim)]), other, t)

        return split_rows(out, self.plan.outs, rows, put, "apply_routed")

    def looped(self, index: Sequence[int] | None) -> Any:
        """Calls member by member, each on its rows."""
        if index is None:
            raise ValueError(errors.say("apply_routed", "the values of index must be known to a loop", None, "call it outside"))
        rows_of: dict[int, list[int]] = {}
        for row, m in enumerate(index):
            rows_of.setdefault(m, []).append(row)
        outs = [self._member_call(m, rows) for m, rows in rows_of.items()]
        (m, rows), *_ = rows_of.items()
        axes = self._row_axes(outs[0], self._member_call(m, [*rows, rows[0]]), len(rows))
        back = torch.argsort(torch.tensor([row for rows in rows_of.values() for row in rows]))
        found = iter(axes)

        def put(ts: list[Tensor]) -> Tensor:
            axis = next(found)
            return torch.cat(self._even(ts, axis), axis).index_select(axis, back)

        return joined(outs, put)

    def _member_call(self, m: int, rows: list[int]) -> Any:
        """Calls the net with one member, or the bare base, on some rows."""
        args, kwargs = given = self.inputs.picked(torch.tensor(rows))
        if m < 0:
            return self._bare(given)
        one, context = member(self.stacked, m), seed_of(self.context, m)
        return self.net.call(self.call, self.params, one, *args, context=context, **kwargs)

    def _row_axes(self, out: Any, more: Any, rows: int) -> list[int]:
        """Returns the axis of the rows of every tensor of an output, found from one with a row more."""
        axes: list[int] = []
        for (path, t), u in zip(pytree.tree_flatten_with_path(out)[0], pytree.tree_leaves(more), strict=True):
            if not isinstance(t, Tensor):
                continue
            ids = t.ndim == 2 and not t.is_floating_point()
            pairs = list(zip(t.shape, u.shape, strict=True))[: 1 if ids else None]
            odd = [i for i, (a, b) in enumerate(pairs) if a != b]
            if len(odd) != 1 or pairs[odd[0]] != (rows, rows + 1):
                rule, found = "must carry the rows of the batch", f"shape {tuple(t.shape)} with {rows} rows"
                where = f"apply_routed: output {pytree.keystr(path)}"
                raise ValueError(errors.say(where, rule, found, "take outputs that do not mix rows"))
            axes += odd
        return axes

    @property
    def _wraps(self) -> bool:
        return any(e.method.wraps for e in self.net.entries)

    def _folded(self, groups: Any, contexts: Any, layout: Layout, given: tuple[Any, Any]) -> Any:
        options: dict[str, Any] = {"contexts": contexts, "places": self.plan.places, "call": self.call}
        return call_folded(self.net, self.params, groups, layout, given, **options)

    def _bare(self, given: tuple[Any, Any]) -> Any:
        args, kwargs = given
        return self.net.model.call(self.call, self.params, *args, **from_inputs(kwargs)[0])

    def _beside(self, adapted: Any, bare: Any) -> Any:
        """Puts the outputs of bare rows after those of rows with prompts."""
        return joined([adapted, bare], lambda ts: torch.cat(self._even(ts, 0)))

    def _even(self, tensors: list[Tensor], axis: int) -> list[Tensor]:
        """Pads ids to one length; other tensors must agree in all but the rows."""
        tensors = evened(tensors, axis, padding(self.net, self.inputs))
        shapes = {t.shape[:axis] + t.shape[axis + 1 :] for t in tensors}
        if len(shapes) > 1:
            rule, found = "all rows must have outputs of one shape", sorted(tuple(s) for s in shapes)
            remedy = "take outputs that do not mix rows, and call rows with prompts and bare ones apart"
            raise ValueError(errors.say("apply_routed", rule, found, remedy))
        return tensors


def _reordered(t: Tensor, axis: int, back: Tensor, rows: int) -> Tensor:
    per = t.shape[axis] // rows
    if per == 1:
        return t.index_select(axis, back)
    return t.unflatten(axis, (rows, per)).index_select(axis, back).flatten(axis, axis + 1)


def _integers(index: Any) -> Tensor:
    """Returns an index as a tensor ``(rows,)`` of integers."""
    if not isinstance(index, Tensor):
        if not isinstance(index, Sequence) or isinstance(index, str) or any(type(i) is not int for i in index):
            found = type(index).__name__
            raise TypeError(errors.say("apply_routed", "index must hold integers", found, "pass a tensor or a list of ints"))
        index = torch.tensor(list(index), dtype=torch.int64)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(errors.say("apply_routed", "index must hold integers", index.dtype))
    if index.ndim != 1:
        raise ValueError(errors.say("apply_routed", "index must be (rows,), one member per row", tuple(index.shape)))
    return index


def _checked(index: Tensor, n: int, rows: int) -> list[int] | None:
    """Checks an index against the batch, and returns its values, ``None`` where they are hidden."""
    if index.shape[0] != rows:
        raise ValueError(errors.say("apply_routed", f"index must be ({rows},), one member per row", tuple(index.shape)))
    known = _values(index)
    odd = [i for i in known or () if not -1 <= i < n]
    if odd:
        raise ValueError(errors.say("apply_routed", f"index must be in [-1, {n})", errors.listed(odd)))
    return known


def _values(index: Tensor) -> list[int] | None:
    """Returns the values of an index, ``None`` where a trace or a transform hides them."""
    if torch.compiler.is_compiling():
        return None
    try:
        return [int(i) for i in index.tolist()]
    except RuntimeError:
        return None
