"""Inputs of many members: where the member axis and the rows of each tensor are, and the batch that all of them make.

``in_dims`` says where the member axis of an input is, as in ``torch.func.vmap``; ``batch_dims`` where its rows are once the
member axis is taken out. Both are a value for all, or a tree prefix of ``(args, kwargs)``. Imports caches, errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funcpeft import errors
from funcpeft.caches import is_cache


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of a call, flat.

    Attributes:
        leaves: Tensors and other values.
        names: Where each is, for messages.
        spec: Their tree.
        member_axes: Axis of the members by leaf; ``None`` for what all share.
        row_axes: Axis of the rows by leaf, counted without the member axis; ``None`` for what has none.
        rows: Rows of each member.
        owned: Leaves of caches, which a forward fills in place, so that every call gets a copy.
    """

    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    spec: Any
    member_axes: tuple[int | None, ...]
    row_axes: tuple[int | None, ...]
    rows: int
    owned: tuple[bool, ...]

    @property
    def mapped_axes(self) -> list[int]:
        """The axis of the members of those leaves."""
        return [a for a in self.member_axes if a is not None]

    @property
    def mapped(self) -> list[Tensor]:
        """The leaves with a member axis."""
        return [t for t, a in zip(self.leaves, self.member_axes, strict=True) if a is not None]

    def unflat(self, leaves: Sequence[Any]) -> tuple[Any, Any]:
        """Returns ``(args, kwargs)`` with other leaves."""
        own = [t.clone() if o and isinstance(t, Tensor) else t for t, o in zip(leaves, self.owned, strict=True)]
        return pytree.tree_unflatten(own, self.spec)

    def with_mapped(self, mapped: Sequence[Any]) -> tuple[Any, Any]:
        """Returns ``(args, kwargs)`` of one member, given its part of every mapped leaf."""
        left = iter(mapped)
        return self.unflat([t if a is None else next(left) for t, a in zip(self.leaves, self.member_axes, strict=True)])

    def member(self, index: int) -> Inputs:
        """Returns one member's inputs, as those of a population that shares them."""
        leaves = [t if a is None else t.select(a, index) for t, a in zip(self.leaves, self.member_axes, strict=True)]
        return replace(self, leaves=tuple(leaves), member_axes=(None,) * len(leaves))

    def chunk(self, start: int, stop: int) -> Inputs:
        """Returns the inputs of the members from ``start`` on and before ``stop``, as views."""
        leaves = [
            t if a is None else t.narrow(a, start, stop - start) for t, a in zip(self.leaves, self.member_axes, strict=True)
        ]
        return replace(self, leaves=tuple(leaves))

    def folded(self, members: int) -> tuple[Any, Any]:
        """Returns ``(args, kwargs)`` of one batch with the rows of all members, one member after the other.

        Raises:
            ValueError: If an input has members but no rows, so that no batch can hold it.
        """
        return self.unflat([self._fold(i, members) for i in range(len(self.leaves))])

    def _fold(self, i: int, members: int) -> Any:
        t, member_axis, row_axis = self.leaves[i], self.member_axes[i], self.row_axes[i]
        if not isinstance(t, Tensor) or (row_axis is None and member_axis is None):
            return t
        if row_axis is None:
            rule = "with a member axis it must have rows to be folded"
            raise ValueError(errors.say(f"input {self.names[i]}", rule, "batch_dims None", "use strategy='vmap' or 'loop'"))
        if member_axis is None:
            if t.shape[row_axis] != self.rows:  # one row for all: the model broadcasts it
                return t
            t = t.unsqueeze(0).expand(members, *t.shape)
        else:
            t = t.movedim(member_axis, 0)
        t = t.movedim(row_axis + 1, 1)
        t = t.expand(members, self.rows, *t.shape[2:]).reshape(members * self.rows, *t.shape[2:])
        return t.movedim(0, row_axis)

    def picked(self, index: Tensor) -> tuple[Any, Any]:
        """Returns ``(args, kwargs)`` with the rows taken in another order, or some of them."""
        return self.unflat(
            [
                t if a is None or t.shape[a] != self.rows else t.index_select(a, index)
                for t, a in zip(self.leaves, self.row_axes, strict=True)
            ]
        )


def inputs_of(where: str, args: Any, kwargs: Any, in_dims: Any, batch_dims: Any, members: int | None) -> Inputs:
    """Reads the inputs of a call.

    Args:
        where: Name of the caller in messages.
        args: Positional inputs of the model.
        kwargs: Keyword inputs of the model.
        in_dims: Axis of the members: an int, ``None``, or a tree prefix of ``(args, kwargs)``; a dict is that of keywords.
        batch_dims: Axis of the rows, likewise.
        members: Number of members; ``None`` if there is no member axis.

    Raises:
        TypeError: If a prefix does not fit the inputs.
        ValueError: If an axis is out of range, sizes disagree, or no input has rows.
    """
    in_dims, batch_dims = (((0,) * len(args), d) if isinstance(d, Mapping) else d for d in (in_dims, batch_dims))
    keyed, spec = pytree.tree_flatten_with_path((args, kwargs))
    names = tuple(_name(path) for path, _ in keyed)
    leaves = tuple(leaf for _, leaf in keyed)
    given = (_prefix(where, "in_dims", in_dims, (args, kwargs)), _prefix(where, "batch_dims", batch_dims, (args, kwargs)))
    member_axes: list[int | None] = []
    row_axes: list[int | None] = []
    for leaf, name, axis, row in zip(leaves, names, *given, strict=True):
        if not isinstance(leaf, Tensor):
            axis = row = None
        member_axes.append(_axis(where, "in_dims", name, axis, leaf.ndim if axis is not None else 0))
        if row is not None and leaf.ndim == (axis is not None):
            row = None  # a number has no rows
        row_axes.append(_axis(where, "batch_dims", name, row, leaf.ndim - (axis is not None) if row is not None else 0))
    for leaf, name, axis in zip(leaves, names, member_axes, strict=True):
        if axis is not None and leaf.shape[axis] != members:
            rule, found = f"axis {axis} must hold the {members} members", f"shape {tuple(leaf.shape)}"
            raise ValueError(errors.say(f"{where}: input {name}", rule, found, "give its in_dims, None for what all share"))
    sizes = {
        name: leaf.shape[row + (axis is not None and axis <= row)]
        for leaf, name, axis, row in zip(leaves, names, member_axes, row_axes, strict=True)
        if row is not None
    }
    counts = {n for n in sizes.values() if n != 1} or set(sizes.values())
    if len(counts) != 1:
        rule = "inputs must have rows, as many in each" if counts else "an input must have rows"
        raise ValueError(errors.say(where, rule, sizes or None, "give batch_dims, None for what has no rows"))
    rows = counts.pop()
    if not rows:
        raise ValueError(errors.say(where, "inputs must have at least one row", sizes))
    held = {id(t) for v in (*args, *kwargs.values()) if is_cache(v) for t in pytree.tree_leaves(v)}
    owned = tuple(id(t) in held for t in leaves) if held else (False,) * len(leaves)
    return Inputs(leaves, names, spec, tuple(member_axes), tuple(row_axes), rows, owned)


def _axis(where: str, what: str, name: str, axis: Any, ndim: int) -> int | None:
    if axis is None:
        return None
    if not isinstance(axis, int) or isinstance(axis, bool):
        raise TypeError(errors.say(f"{where}: {what} of {name}", "must be an int or None", type(axis).__name__))
    if not -ndim <= axis < ndim:
        raise ValueError(errors.say(f"{where}: {what} of {name}", f"must be in [-{ndim}, {ndim})", axis))
    return axis % ndim


def _name(path: Any) -> str:
    """Returns a leaf's name: the keyword, or the position, and where it is in it."""
    first, rest = path[1], path[2:]
    return str(first.idx if isinstance(first, pytree.SequenceKey) else first.key) + pytree.keystr(rest)


def _prefix(where: str, what: str, prefix: Any, tree: Any) -> list[Any]:
    """Returns the value of a tree prefix at every leaf of a tree; keywords that a dict leaves out are at 0."""
    if not isinstance(prefix, tuple | list | Mapping):
        return [prefix] * len(pytree.tree_leaves(tree))
    if isinstance(tree, Mapping) and isinstance(prefix, Mapping):
        if unknown := sorted(prefix.keys() - tree.keys()):
            raise TypeError(errors.say(where, f"{what} must name inputs of the call", errors.listed(unknown)))
        return [v for k in tree for v in _prefix(where, what, prefix.get(k, 0), tree[k])]
    if isinstance(tree, tuple | list) and isinstance(prefix, tuple | list) and len(tree) == len(prefix):
        return [v for p, t in zip(prefix, tree, strict=True) for v in _prefix(where, what, p, t)]
    found = f"{type(prefix).__name__} for {type(tree).__name__}"
    raise TypeError(errors.say(where, f"{what} must be a value for all or a tree prefix of (args, kwargs)", found))


#: Axis of the rows, by name, of leaves of an output that do not have them on the first; ``None`` for what all rows share.
OutAxes = Mapping[str, int | None]


def split_rows(out: Any, axes: OutAxes, rows: int, split: Callable[[Tensor, int | None], Tensor], where: str) -> Any:
    """Applies ``split`` to every tensor of an output, with the axis of its rows, ``None`` for what all rows share.

    Raises:
        ValueError: If a tensor does not carry the rows of the batch; the message names it.
    """
    leaves, spec = pytree.tree_flatten(out)
    names = out_names(out) if axes else [""] * len(leaves)
    made: list[Any] = []
    for i, (t, name) in enumerate(zip(leaves, names, strict=True)):
        if not isinstance(t, Tensor):
            made.append(t)
            continue
        axis = axes.get(name, 0 if t.ndim or t.is_floating_point() else None)
        if axis is not None and (t.ndim <= axis or t.shape[axis] % rows):
            rule, remedy = f"must carry the {rows} rows of the batch", "take losses from logits, or use strategy='loop'"
            raise ValueError(errors.say(f"{where}: output {out_names(out)[i]}", rule, f"shape {tuple(t.shape)}", remedy))
        made.append(split(t, axis))
    return pytree.tree_unflatten(made, spec)


def out_names(out: Any) -> list[str]:
    """Returns the names of the leaves of an output, for messages."""
    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(out)[0]]


def joined(outs: Sequence[Any], put: Callable[[list[Tensor]], Tensor]) -> Any:
    """Puts outputs of equal structure together, tensor by tensor; what is no tensor is the first one's.

    Raises:
        ValueError: If their structures differ.
    """
    flat = [pytree.tree_flatten(o) for o in outs]
    if len({len(leaves) for leaves, _ in flat}) > 1:
        names = [out_names(o) for o in outs]
        odd = sorted(set(max(names, key=len)) - set(min(names, key=len)))
        rule, remedy = "all members and rows must return the same outputs", "call those that differ apart, or use_cache=False"
        raise ValueError(errors.say("a population", rule, f"only some return {errors.listed(odd)}", remedy))
    made: list[Any] = []
    for i, ts in enumerate(zip(*(leaves for leaves, _ in flat), strict=True)):
        if not isinstance(ts[0], Tensor) and isinstance(ts[0], int | float) and any(t != ts[0] for t in ts[1:]):
            name, remedy = out_names(outs[0])[i], "return it as a tensor"
            raise ValueError(errors.say(f"a population: output {name}", "a number must be the same for all", ts, remedy))
        made.append(put(list(ts)) if isinstance(ts[0], Tensor) else ts[0])
    return pytree.tree_unflatten(made, flat[0][1])


def evened(tensors: list[Tensor], axis: int, value: int) -> list[Tensor]:
    """Pads token ids ``(..., rows, length)`` of unequal length at the end; ``axis`` is where rows are, -1 if never mind."""
    longest = {t.shape[-1] if t.ndim else 0 for t in tensors}
    ids = all(t.ndim in (2, 3) and not t.is_floating_point() for t in tensors)
    if not ids or len(longest) == 1 or axis > 0:
        return tensors
    return [torch.nn.functional.pad(t, (0, max(longest) - t.shape[-1]), value=value) for t in tensors]
