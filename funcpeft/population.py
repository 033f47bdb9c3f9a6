"""Many adapters at once: ``apply_many`` for members with inputs of their own or shared, ``apply_routed`` by row.

Both fold the members into one ordinary batch (``fold``), after a probe has shown that the model's rows are independent
(``probe``); where they are not, the whole model is vmapped or members run one after the other. Imports probe, inputs, fold,
adapt, stacking.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.adapt import Net
from funcpeft.context import EVAL, Context
from funcpeft.fold import Layout
from funcpeft.functional import Params
from funcpeft.inputs import Inputs, inputs_of, joined, out_names, padded_stack, split_rows
from funcpeft.probe import UNPROBED, Plan, call_folded, call_vmapped, probe
from funcpeft.stacking import select
from funcpeft.tree import Adapters, as_tuple

STRATEGIES = ("auto", "fold", "vmap", "loop")

#: Tokens of a chunk of members from which a larger one was no faster on a CPU.
CHUNK_TOKENS = 4096


class PopulationWarning(UserWarning):
    """A population is called in a slower way than folded; the message says which and why."""


def apply_many(
    net: Net,
    params: Params,
    stacked: Adapters,
    /,
    *args: Any,
    in_dims: Any = 0,
    batch_dims: Any = 0,
    strategy: str = "auto",
    chunk_size: int | str | None = "auto",
    call: str = "forward",
    context: Context = EVAL,
    **kwargs: Any,
) -> Any:
    """Calls a net with N adapters at once.

    The members are folded into the batch: the model sees one batch of all their rows, and only at adapted sites each
    member's own leaves act on its own rows. Values and gradients are those of N separate calls.

    Args:
        net: The net.
        params: The base's leaves, which all members share.
        stacked: What ``fp.stack`` made of N adapters; ranks may differ.
        args: The model's positional inputs.
        in_dims: Axis of the members in the inputs, ``None`` for an input that all members share: a value for all, or a tree
            prefix of ``(args, kwargs)``, whose dict of keywords may leave out those at 0.
        batch_dims: Axis of the rows, counted without the member axis, ``None`` for an input that has none; likewise. An
            axis of size 1 is broadcast.
        strategy: ``"fold"``; ``"vmap"``, the whole model under ``torch.func.vmap``; ``"loop"``; or ``"auto"``: the first of
            them that is right for this model, with a warning that says why if it is not the fold.
        chunk_size: Members that are folded at a time; ``"auto"`` takes about 4096 tokens, ``None`` takes all.
        call: Method of the module: ``"forward"`` or ``"generate"``. Generated ids are padded at their end.
        context: Training flag and seed; a seed tensor ``(N,)`` is one per member.
        kwargs: The model's keyword inputs.

    Returns:
        What the model returns, with a leading axis of N on every tensor.

    Raises:
        TypeError: If the adapters were not made for this net, or ``in_dims`` or ``batch_dims`` is no prefix of the inputs.
        ValueError: If sizes disagree; if with ``strategy="fold"`` the rows of a batch depend on each other, or an output has
            no rows: the message names the site or the output.

    Note:
        The first call of a form of inputs probes the model with a few rows (``plan_many`` shows what it found); inside
        ``torch.compile`` nothing can be probed, so call it once outside before. Outputs that mix rows, such as the ``loss``
        of ``labels=``, do not fold: take losses from logits.

    Example:
        >>> import torch
        >>> import funcpeft as fp
        >>> model, params = fp.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 3)))
        >>> net = fp.adapt(model, fp.LoRA(r=2, target_modules=["0"]))
        >>> many = fp.stack([net.init(params, seed=s) for s in range(5)])
        >>> fp.apply_many(net, params, many, torch.ones(2, 4), in_dims=None).shape
        torch.Size([5, 2, 3])
    """
    n = _members(net, stacked)
    _require_choice(strategy, call)
    read = functools.partial(inputs_of, "apply_many", in_dims=in_dims, batch_dims=batch_dims, members=n)
    inputs = read(args, kwargs)
    _require_seeds(context, n)
    plan = _plan(net, params, stacked, inputs, n, call, strategy, lambda: read(args, _short(call, kwargs)))
    size = _chunk(chunk_size, inputs, n)
    if plan.strategy != "fold" or size >= n:
        return _call_many(net, params, stacked, inputs, n, plan, call, context)
    outs: list[Any] = []
    for start in range(0, n, size):
        stop = min(start + size, n)
        part, own = _narrowed(stacked, start, stop), _seeds(context, torch.arange(start, stop))
        outs.append(_call_many(net, params, part, inputs.chunk(start, stop), stop - start, plan, call, own))
    return joined(outs, torch.cat)


def plan_many(
    net: Net,
    params: Params,
    stacked: Adapters,
    /,
    *args: Any,
    in_dims: Any = 0,
    batch_dims: Any = 0,
    call: str = "forward",
    **kwargs: Any,
) -> Plan:
    """Says how ``apply_many`` calls these inputs, and why; printed, the strategy and the reason. Arguments as there."""
    n = _members(net, stacked)
    inputs = inputs_of("plan_many", args, _short(call, kwargs), in_dims, batch_dims, n)
    return probe(net, params, stacked, inputs, n, call)


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
            its own, and its values are not checked.
        args: The model's positional inputs.
        batch_dims: Axis of the rows: a value for all inputs, or a tree prefix of ``(args, kwargs)``.
        strategy: ``"fold"``, ``"loop"``, or ``"auto"``: the fold where it is right, else the loop, with a warning.
        call: Method of the module: ``"forward"`` or ``"generate"``.
        context: Training flag and seed; a seed tensor ``(N,)`` is one per member.
        kwargs: The model's keyword inputs.

    Returns:
        What the model returns, rows in the order of the inputs.

    Raises:
        ValueError: If ``index`` has another length than the batch, or a value outside of [-1, N); else as ``apply_many``.
        TypeError: If ``index`` does not hold integers; else as ``apply_many``.
    """
    n = _members(net, stacked)
    _require_choice(strategy, call, ("auto", "fold", "loop"))
    read = functools.partial(inputs_of, "apply_routed", in_dims=None, batch_dims=batch_dims, members=None)
    inputs = read(args, kwargs)
    _require_seeds(context, n)
    index = _index(index, n, inputs.rows)
    plan = _plan(net, params, stacked, inputs, n, call, strategy, lambda: read(args, _short(call, kwargs)))
    known = _values(index)
    if plan.strategy != "fold":
        return _looped_rows(net, params, stacked, known, inputs, call, context)
    if known is None:
        return _by_row(net, params, stacked, index, inputs, plan, call, context)
    routes = _route(known, n, whole=context.training)
    order = torch.tensor(routes.order, device=index.device)
    groups = [select(stacked, list(m)) for m in routes.members]
    contexts = [_seeds(context, torch.tensor(m)) for m in routes.members]
    options: dict[str, Any] = {"contexts": contexts, "places": plan.places, "call": call}
    acting = inputs.rows - routes.layout.rest
    if any(e.method.wraps for e in net.entries) and 0 < acting < inputs.rows:  # a call with prompts and one without
        layout = replace(routes.layout, rest=0)
        first = call_folded(net, params, groups, layout, inputs.picked(order[:acting]), **options)
        args_, kwargs_ = inputs.picked(order[acting:])
        bare = net.model.call(call, params, *args_, **kwargs_)
        if out_names(first) != out_names(bare):
            rule, remedy = "rows with an adapter and bare ones must return the same outputs", "call the model for bare rows"
            raise ValueError(errors.say("apply_routed", rule, errors.listed(out_names(first)), remedy))
        out = joined([first, bare], lambda ts: torch.cat(_evened(ts, _padding(net, inputs))))
    else:
        out = call_folded(net, params, groups, routes.layout, inputs.picked(order), **options)
    back = torch.argsort(order)
    put = lambda t, axis: t if axis is None else _reordered(t, axis, back, inputs.rows)  # noqa: E731
    return split_rows(out, plan.outs, inputs.rows, put, "apply_routed")


# -- calling ----------------------------------------------------------------------------------------------------------------


def _call_many(
    net: Net, params: Params, stacked: Adapters, inputs: Inputs, n: int, plan: Plan, call: str, context: Context
) -> Any:
    if plan.strategy == "vmap":
        return call_vmapped(net, params, stacked, inputs, context, call)
    if plan.strategy == "loop":
        outs: list[Any] = []
        for i in range(n):
            args, kwargs = inputs.with_mapped([t.select(a, i) for t, a in zip(inputs.mapped, _axes(inputs), strict=True)])
            one = _member(stacked, i)
            outs.append(net.call(call, params, one, *args, context=_seed(context, i), **kwargs))
        return joined(outs, lambda ts: padded_stack(ts, _padding(net, inputs)))
    layout = Layout(((n, inputs.rows),))
    out = call_folded(net, params, [stacked], layout, inputs.folded(n), contexts=[context], places=plan.places, call=call)
    return split_rows(out, plan.outs, layout.rows, lambda t, axis: _apart(t, axis, n), "apply_many")


def _apart(t: Tensor, axis: int | None, n: int) -> Tensor:
    """Gives an output its member axis."""
    if axis is None:
        return t.expand(n, *t.shape)
    return t.unflatten(axis, (n, t.shape[axis] // n)).movedim(axis, 0)


def _axes(inputs: Inputs) -> list[int]:
    return [a for a in inputs.member_axes if a is not None]


def _member(stacked: Adapters, i: int) -> Any:
    """Returns one member as it acts in a stack: ranks stay padded."""
    made = select(stacked, [i])
    taken = lambda tree: {p: {k: t[0] for k, t in leaves.items()} for p, leaves in tree.items()}  # noqa: E731
    ones = tuple(a.replace(params=taken(a.params), consts=taken(a.consts)) for a in as_tuple(made))
    return ones if isinstance(made, tuple) else ones[0]


def _narrowed(stacked: Adapters, start: int, stop: int) -> Any:
    cut = lambda tree: {p: {k: t[start:stop] for k, t in leaves.items()} for p, leaves in tree.items()}  # noqa: E731
    made = tuple(a.replace(params=cut(a.params), consts=cut(a.consts)) for a in as_tuple(stacked))
    return made if isinstance(stacked, tuple) else made[0]


def _padding(net: Net, inputs: Inputs) -> int:
    kwargs = inputs.unflat(inputs.leaves)[1]
    for given in (kwargs.get("pad_token_id"), getattr(net.model.config, "pad_token_id", None)):
        if isinstance(given, int):
            return given
    return 0


def _chunk(asked: int | str | None, inputs: Inputs, n: int) -> int:
    """Returns how many members are folded at a time."""
    if asked is None or (asked == "auto" and torch.compiler.is_compiling()):
        return n
    if asked != "auto":
        if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
            raise ValueError(errors.say("apply_many", "chunk_size must be a positive integer, 'auto' or None", repr(asked)))
        return asked
    return max(1, CHUNK_TOKENS // max(1, _tokens(inputs, n)))


def _tokens(inputs: Inputs, n: int) -> int:
    """Counts one member's tokens: entries of its largest input of ids, else of the rest without the last axis."""
    counts = [1]
    for t, axis, row in zip(inputs.leaves, inputs.member_axes, inputs.row_axes, strict=True):
        if isinstance(t, Tensor) and row is not None:
            size = t.numel() // (n if axis is not None else 1)
            counts.append(size // (t.shape[-1] or 1) if t.is_floating_point() else size)
    return max(counts)


# -- the plan ---------------------------------------------------------------------------------------------------------------


def _plan(
    net: Net, params: Params, stacked: Adapters, inputs: Inputs, n: int, call: str, strategy: str, probed: Callable[[], Inputs]
) -> Plan:
    """Returns how to call this form of inputs, found by a probe of ``probed()`` the first time."""
    if strategy in ("vmap", "loop"):
        return Plan(strategy)
    key = _key(net, params, inputs, n, call)
    if torch.compiler.is_compiling():
        return net.plans.get(key) or UNPROBED
    plan = net.plans.get(key)
    if plan is None:
        plan = net.plans[key] = probe(net, params, stacked, probed(), n, call)
        if plan.strategy != "fold" and strategy == "auto":
            remedy = f"pass strategy={plan.strategy!r} to say so"
            rule = f"members run by {plan.strategy}, which is slower than the fold"
            warnings.warn(errors.say(f"apply_many of {net.model.name}", rule, plan.reason, remedy), PopulationWarning, 3)
    if strategy == "fold" and plan.strategy != "fold":
        raise ValueError(errors.say(f"apply_many of {net.model.name}", "the members must fold", plan.reason, "use 'auto'"))
    return plan


def _key(net: Net, params: Params, inputs: Inputs, n: int, call: str) -> str:
    """Names the form of a call: what a probe's answer depends on, but for sizes."""
    forms = [
        f"{name} {t.ndim} {t.dtype} {axis} {row} {row is not None and inputs.rows > 1}"
        if isinstance(t, Tensor)
        else f"{name} {t}"
        for name, t, axis, row in zip(inputs.names, inputs.leaves, inputs.member_axes, inputs.row_axes, strict=True)
    ]
    return "; ".join([call, *forms])


def _short(call: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the keywords of a probe: for ``generate`` those of a short greedy run."""
    if call != "generate":
        return kwargs
    left = {k: v for k, v in kwargs.items() if k not in ("max_length", "min_length", "min_new_tokens")}
    return {**left, "max_new_tokens": 2, "do_sample": False}


# -- routing ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Routes:
    """Rows sorted so that each member's are together, and members with as many rows too."""

    order: list[int]
    layout: Layout
    members: list[tuple[int, ...]]


def _route(index: Sequence[int], n: int, *, whole: bool) -> _Routes:
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


def _by_row(
    net: Net, params: Params, stacked: Adapters, index: Tensor, inputs: Inputs, plan: Plan, call: str, context: Context
) -> Any:
    """Gives every row leaves of its own, where the values of ``index`` are not known; the bare base is the last choice."""
    rows = index.shape[0]
    group = select(stacked, index.clamp(min=0))
    own = _seeds(context, index.clamp(min=0))
    layout = Layout(((rows, 1),))
    inputs_ = inputs.unflat(inputs.leaves)
    out = call_folded(net, params, [group], layout, inputs_, contexts=[own], places=plan.places, call=call)
    bare = net.model(params, *inputs_[0], **inputs_[1])
    is_bare = index < 0

    def put(ts: list[Tensor]) -> Tensor:
        shape = [rows] + [1] * (ts[0].ndim - 1)
        return torch.where(is_bare.reshape(shape), ts[1], ts[0])

    return joined([out, bare], put)


def _looped_rows(
    net: Net, params: Params, stacked: Adapters, index: list[int] | None, inputs: Inputs, call: str, context: Context
) -> Any:
    if index is None:
        raise ValueError(errors.say("apply_routed", "the values of index must be known to a loop", None, "call it outside"))
    rows_of: dict[int, list[int]] = {}
    for row, m in enumerate(index):
        rows_of.setdefault(m, []).append(row)
    outs: list[Any] = []
    for m, rows in rows_of.items():
        args, kwargs = inputs.picked(torch.tensor(rows))
        if m < 0:
            outs.append(net.model.call(call, params, *args, **kwargs))
        else:
            outs.append(net.call(call, params, _member(stacked, m), *args, context=_seed(context, m), **kwargs))
    back = torch.argsort(torch.tensor([row for rows in rows_of.values() for row in rows]))
    for out, rows in zip(outs, rows_of.values(), strict=True):
        split_rows(out, {}, len(rows), lambda t, axis: t, "apply_routed")
    return joined(outs, lambda ts: torch.cat(_evened(ts, _padding(net, inputs))).index_select(0, back))


def _evened(tensors: list[Tensor], value: int) -> list[Tensor]:
    """Pads token ids to one length; other tensors must agree in all but the rows."""
    longest = max((t.shape[1] for t in tensors if t.ndim == 2), default=0)
    ids = all(t.ndim == 2 and not t.is_floating_point() for t in tensors)
    if not ids and len({t.shape[1:] for t in tensors}) > 1:
        rule, found = "outputs of a row must not depend on the number of rows", sorted(tuple(t.shape) for t in tensors)
        raise ValueError(errors.say("apply_routed", rule, found, "take outputs that do not mix rows"))
    return [torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=value) for t in tensors] if ids else tensors


def _reordered(t: Tensor, axis: int, back: Tensor, rows: int) -> Tensor:
    per = t.shape[axis] // rows
    if per == 1:
        return t.index_select(axis, back)
    return t.unflatten(axis, (rows, per)).index_select(axis, back).flatten(axis, axis + 1)


# -- checks -----------------------------------------------------------------------------------------------------------------


def _members(net: Net, stacked: Adapters) -> int:
    if not isinstance(net, Net):
        raise TypeError(errors.say("apply_many", "a Net is required first", type(net).__name__, "make it with adapt"))
    return net.members(stacked)


def _require_choice(strategy: str, call: str, known: tuple[str, ...] = STRATEGIES) -> None:
    if strategy not in known:
        raise ValueError(errors.one_of("apply_many", "strategy", strategy, known))
    if call not in ("forward", "generate"):
        raise ValueError(errors.one_of("apply_many", "call", call, ("forward", "generate")))


def _require_seeds(context: Context, n: int) -> None:
    if not isinstance(context, Context):
        raise TypeError(errors.say("apply_many", "context must be a Context", type(context).__name__))
    if isinstance(context.seed, Tensor) and context.seed.ndim and tuple(context.seed.shape) != (n,):
        found = f"shape {tuple(context.seed.shape)}"
        raise ValueError(errors.say("apply_many", f"a seed tensor must be 0-d or ({n},), one per member", found))


def _seeds(context: Context, index: Tensor) -> Context:
    """Returns the context of some members."""
    if isinstance(context.seed, Tensor) and context.seed.ndim:
        return replace(context, seed=context.seed.index_select(0, index.to(context.seed.device)))
    return context


def _seed(context: Context, i: int) -> Context:
    several = isinstance(context.seed, Tensor) and bool(context.seed.ndim)
    return replace(context, seed=context.seed[i]) if several else context  # type: ignore[index]  # a tensor, as just seen


def _index(index: Any, n: int, rows: int) -> Tensor:
    index = index if isinstance(index, Tensor) else torch.tensor(list(index))
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(errors.say("apply_routed", "index must hold integers", index.dtype))
    if tuple(index.shape) != (rows,):
        raise ValueError(errors.say("apply_routed", f"index must be ({rows},), one member per row", tuple(index.shape)))
    known = _values(index)
    odd = [i for i in known or () if not -1 <= i < n]
    if odd:
        raise ValueError(errors.say("apply_routed", f"index must be in [-1, {n})", errors.listed(odd)))
    return index


def _values(index: Tensor) -> list[int] | None:
    """Returns the values of an index, ``None`` where a trace or a transform hides them."""
    if torch.compiler.is_compiling():
        return None
    try:
        return [int(i) for i in index.tolist()]
    except RuntimeError:
        return None
