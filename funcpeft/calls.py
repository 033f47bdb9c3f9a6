"""Calls of a net with many members: folded into one batch, and the whole model under ``vmap``.

What ``population`` and ``routing`` choose between, after ``probe`` has said which is right. Imports adapt, inputs, fold,
stacking, tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funcpeft.adapt import Net
from funcpeft.context import Context, from_inputs
from funcpeft.fold import FIRST, Folded, Layout, Places
from funcpeft.functional import Params
from funcpeft.inputs import Inputs
from funcpeft.stacking import member
from funcpeft.tree import Adapter, Adapters, as_tuple, map_members


def call_folded(
    net: Net,
    params: Params,
    groups: Sequence[Adapters],
    layout: Layout,
    inputs: tuple[Any, Any],
    *,
    contexts: Sequence[Context],
    places: Places = FIRST,
    call: str = "forward",
    observe: Callable[..., None] | None = None,
) -> Any:
    """Calls a net for the rows of several groups of members, in one batch.

    Args:
        net: The net.
        params: The base's leaves.
        groups: One stack of members per group of the layout.
        layout: Which rows are whose.
        inputs: ``(args, kwargs)`` of the batch.
        contexts: The context of each group; a seed tensor with an axis is one seed per member.
        places: Where rows are at the sites.
        call: Method of the module.
        observe: Called at every site with its path and input.
    """
    args, kwargs = inputs
    kwargs, values = from_inputs(kwargs)
    if not groups:
        return net.model.call(call, params, *args, **kwargs)
    made = [net.attach_stacked(params, a, replace(c, values=values)) for a, c in zip(groups, contexts, strict=True)]
    attached = dict(made[0])
    for key in net.adapted_keys():
        owner = net.model.ties.get(key, key)  # what replaces a tied tensor whole stands at its owner's key alone
        base = params[key] if key in params else params[owner]
        read = net.model.site(key).path in places.read
        own = tuple(m[key] if key in m else m[owner] for m in made)
        attached[key] = Folded(own, base, layout, places, observe, read)
    try:
        return net.call_attached(call, attached, _by_row(net, groups, layout), args, kwargs, values, contexts[0])
    except KeyError as e:
        if not torch.compiler.is_compiling():
            net.explain(member(groups[0], 0), e)
        raise


def _by_row(net: Net, groups: Sequence[Adapters], layout: Layout) -> Any:
    """Returns the leaves that methods of the call read, one per row of the batch."""
    rows: list[Adapter] = []
    for i, entry in enumerate(net.entries):
        if not entry.method.wraps:
            rows.append(Adapter())
            continue
        parts: list[Any] = []
        for group, (_, count) in zip(groups, layout.groups, strict=True):
            own = as_tuple(group)[i].leaves("")
            made = torch.func.vmap(entry.method.call_leaves)(own) if own else own
            parts.append({name: t.repeat_interleave(count, 0) for name, t in made.items()})
        rows.append(Adapter({"": {name: torch.cat([p[name] for p in parts]) for name in parts[0]}}))
    return tuple(rows) if len(rows) > 1 else rows[0]


def call_vmapped(net: Net, params: Params, stacked: Adapters, inputs: Inputs, context: Context, call: str = "forward") -> Any:
    """Calls the whole model under ``vmap`` over members."""
    seeded = isinstance(context.seed, Tensor) and bool(context.seed.ndim)

    def one(adapter: Adapters, context: Context, mapped: list[Any]) -> tuple[list[Any], Any]:
        args, kwargs = inputs.with_mapped(mapped)
        return pytree.tree_flatten(net.call(call, params, adapter, *args, context=context, **kwargs))

    in_dims = (0, 0 if seeded else None, inputs.mapped_axes)
    leaves, spec = map_members(one, in_dims, stacked, context, inputs.mapped)
    return pytree.tree_unflatten(leaves, spec)
