"""Many adapters at once, each on inputs of its own or on shared ones: ``apply_many``.

The members are folded into one ordinary batch (``fold``), after a probe has shown that the model's rows are independent
(``probe``); where they are not, the whole model is vmapped or members run one after the other. ``routing`` gives each row of
a batch a member. Imports probe, inputs, fold, adapt,
chunks, stacking.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.adapt import Net
from funcpeft.calls import call_folded, call_vmapped
from funcpeft.chunks import chunk, tokens
from funcpeft.context import EVAL, Context, as_inputs
from funcpeft.entries import require_values
from funcpeft.fold import Layout
from funcpeft.functional import Params
from funcpeft.inputs import Inputs, evened, inputs_of, joined, split_rows
from funcpeft.probe import UNPROBED, Plan, probe
from funcpeft.stacking import member, narrowed
from funcpeft.tree import Adapters

STRATEGIES = ("auto", "fold", "vmap", "loop")


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
            prefix of ``(args, kwargs)``, whose dict of keywords may leave out those at 0 and may be given alone.
        batch_dims: Axis of the rows, counted without the member axis, ``None`` for an input that has none; likewise. An
            axis of size 1 is broadcast.
        strategy: ``"fold"``; ``"vmap"``, the whole model under ``torch.func.vmap``; ``"loop"``; or ``"auto"``: the first of
            them that is right for this model, with a warning that says why if it is not the fold.
        chunk_size: Members that are folded at a time; ``"auto"`` takes about 4096 tokens, ``None`` takes all.
        call: Method of the module: ``"forward"`` or ``"generate"``. Generated ids are padded at their end.
        context: Training flag and seed; a seed tensor ``(N,)`` is one per member. Its values are mapped as the inputs are,
            under the names ``context.<name>`` in ``in_dims`` and ``batch_dims``.
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
    n = checked_members("apply_many", net, stacked, strategy, call, context, STRATEGIES)
    require_values(net.methods, context)
    context, values = as_inputs(context)
    kwargs = {**kwargs, **values}
    read = functools.partial(inputs_of, "apply_many", in_dims=in_dims, batch_dims=batch_dims, members=n)
    inputs = read(args, kwargs)
    size = _chunk(chunk_size, inputs, n)
    plan = plan_of("apply_many", net, params, stacked, inputs, n, call, strategy, lambda: read(args, short(call, kwargs)))
    if plan.strategy != "fold" or size >= n:
        return _call(net, params, stacked, inputs, n, plan, call, context)
    outs: list[Any] = []
    for start in range(0, n, size):
        stop = min(start + size, n)
        part, own = narrowed(stacked, start, stop), seeds_of(context, torch.arange(start, stop))
        outs.append(_call(net, params, part, inputs.chunk(start, stop), stop - start, plan, call, own))
    return joined(outs, lambda ts: torch.cat(evened(ts, -1, padding(net, inputs))))


def plan_many(
    net: Net,
    params: Params,
    stacked: Adapters,
    /,
    *args: Any,
    in_dims: Any = 0,
    batch_dims: Any = 0,
    call: str = "forward",
    context: Context = EVAL,
    **kwargs: Any,
) -> Plan:
    """Says how ``apply_many`` calls these inputs, and why; printed, the strategy and the reason. Arguments as there."""
    n = checked_members("plan_many", net, stacked, "auto", call, context, STRATEGIES)
    kwargs = {**kwargs, **as_inputs(context)[1]}
    inputs = inputs_of("plan_many", args, short(call, kwargs), in_dims, batch_dims, n)
    return probe(net, params, stacked, inputs, n, call)


# -- calling ----------------------------------------------------------------------------------------------------------------


def _call(net: Net, params: Params, stacked: Adapters, inputs: Inputs, n: int, plan: Plan, call: str, context: Context) -> Any:
    if plan.strategy == "vmap":
        return call_vmapped(net, params, stacked, inputs, context, call)
    if plan.strategy == "loop":
        outs: list[Any] = []
        for i in range(n):
            given = [t.select(a, i) for t, a in zip(inputs.mapped, inputs.mapped_axes, strict=True)]
            args, kwargs = inputs.with_mapped(given)
            outs.append(net.call(call, params, member(stacked, i), *args, context=seed_of(context, i), **kwargs))
        return joined(outs, lambda ts: torch.stack(evened(ts, -1, padding(net, inputs))))
    layout = Layout(((n, inputs.rows),))
    out = call_folded(net, params, [stacked], layout, inputs.folded(n), contexts=[context], places=plan.places, call=call)
    return split_rows(out, plan.outs, layout.rows, lambda t, axis: _apart(t, axis, n), "apply_many")


def _apart(t: Tensor, axis: int | None, n: int) -> Tensor:
    """Gives an output its member axis."""
    if axis is None:
        return t.expand(n, *t.shape)
    return t.unflatten(axis, (n, t.shape[axis] // n)).movedim(axis, 0)


def padding(net: Net, inputs: Inputs) -> int:
    """Returns the id with which ``generate`` of these inputs pads."""
    kwargs = inputs.unflat(inputs.leaves)[1]
    configs = (kwargs.get("generation_config"), getattr(net.model.root, "generation_config", None), net.model.config)
    ids = [kwargs.get("pad_token_id"), *(getattr(c, "pad_token_id", None) for c in configs)]
    ends = [kwargs.get("eos_token_id"), *(getattr(c, "eos_token_id", None) for c in configs)]
    ids += [e[0] if isinstance(e, list | tuple) and e else e for e in ends]  # as generate does where no id is for padding
    return next((i for i in ids if isinstance(i, int)), 0)


def _chunk(asked: int | str | None, inputs: Inputs, n: int) -> int:
    """Returns how many members are folded at a time."""
    if asked is None or (asked == "auto" and torch.compiler.is_compiling()):
        return n
    if asked != "auto":
        if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1:
            raise ValueError(errors.say("apply_many", "chunk_size must be a positive integer, 'auto' or None", repr(asked)))
        return asked
    found = zip(inputs.leaves, inputs.member_axes, inputs.row_axes, strict=True)
    return chunk(n, (tokens(t if a is None else t.select(a, 0)) for t, a, row in found if row is not None))


# -- the plan ---------------------------------------------------------------------------------------------------------------


def plan_of(
    where: str,
    net: Net,
    params: Params,
    stacked: Adapters,
    inputs: Inputs,
    n: int,
    call: str,
    strategy: str,
    probed: Callable[[], Inputs],
) -> Plan:
    """Returns how to call this form of inputs, found by a probe of ``probed()`` the first time.

    Raises:
        ValueError: If ``strategy`` is ``"fold"`` and the rows of a batch are not independent.
    """
    if strategy in ("vmap", "loop"):
        return Plan(strategy)
    key = _key(where, inputs, call)
    plan = net.plans.get(key)
    if torch.compiler.is_compiling():
        return plan or UNPROBED
    if plan is None:
        plan = probe(net, params, stacked, probed(), n, call, routed=where == "apply_routed")
        if plan.places.read:
            net.prepare_stacked(params, plan.places.read)
        if plan.compared:
            net.plans[key] = plan
        elif strategy == "auto":
            rule, remedy = "a transform hides the values that say whether rows are independent", "call it once outside"
            warnings.warn(errors.say(f"{where} of {net.model.name}", rule, None, remedy), PopulationWarning, 3)
        if plan.strategy != "fold" and strategy == "auto":
            slower = "loop" if where == "apply_routed" else plan.strategy
            rule, remedy = f"members run by {slower}, which is slower than the fold", f"pass strategy={slower!r} to say so"
            warnings.warn(errors.say(f"{where} of {net.model.name}", rule, plan.reason, remedy), PopulationWarning, 3)
    if strategy == "fold" and plan.strategy != "fold":
        raise ValueError(errors.say(f"{where} of {net.model.name}", "the members must fold", plan.reason, "use 'auto'"))
    return plan


def _key(where: str, inputs: Inputs, call: str) -> str:
    """Names the form of a call: what a probe's answer depends on; of sizes, whether they are 0, 1 or more."""
    forms = [
        f"{name} {[min(n, 2) for n in t.shape]} {t.dtype} {axis} {row}" if isinstance(t, Tensor) else f"{name} {t}"
        for name, t, axis, row in zip(inputs.names, inputs.leaves, inputs.member_axes, inputs.row_axes, strict=True)
    ]
    return "; ".join([where, call, *forms])


def short(call: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the keywords of a probe: for ``generate`` those of a short greedy run."""
    if call != "generate":
        return kwargs
    left = {k: v for k, v in kwargs.items() if k not in ("max_length", "min_length")}
    return {**left, "min_new_tokens": 2, "max_new_tokens": 2, "do_sample": False}


# -- checks -----------------------------------------------------------------------------------------------------------------


def checked_members(
    where: str, net: Net, stacked: Adapters, strategy: str, call: str, context: Context, strategies: tuple[str, ...]
) -> int:
    """Counts the members of a stack, after a check of everything but the inputs."""
    if not isinstance(net, Net):
        raise TypeError(errors.say(where, "a Net is required first", type(net).__name__, "make it with adapt"))
    n = net.members(stacked)
    if strategy not in strategies:
        raise ValueError(errors.one_of(where, "strategy", strategy, strategies))
    if call not in ("forward", "generate"):
        raise ValueError(errors.one_of(where, "call", call, ("forward", "generate")))
    if not isinstance(context, Context):
        raise TypeError(errors.say(where, "context must be a Context", type(context).__name__))
    if isinstance(context.seed, Tensor) and context.seed.ndim and tuple(context.seed.shape) != (n,):
        found = f"shape {tuple(context.seed.shape)}"
        raise ValueError(errors.say(where, f"a seed tensor must be 0-d or ({n},), one per member", found))
    return n


def seeds_of(context: Context, index: Tensor) -> Context:
    """Returns the context of some members."""
    if isinstance(context.seed, Tensor) and context.seed.ndim:
        return replace(context, seed=context.seed.index_select(0, index.to(context.seed.device)))
    return context


def seed_of(context: Context, i: int) -> Context:
    """Returns the context of one member."""
    if isinstance(context.seed, Tensor) and context.seed.ndim:
        return replace(context, seed=context.seed[i])
    return context
