"""Folding: a weight of many members meets one ordinary batch, whose rows are those of the members one after the other.

The base sees plain tensors; at an adapted weight the rows are told apart again and the method's own ``apply`` runs for the
members of a group under ``vmap``, or in the batched form that the method gives. ``Layout`` says which rows are whose,
``Folded`` is the weight. Imports weights, tree, errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.tree import register
from funcpeft.weights import Adapted, Base, Quantized, Site, dense_pair, meet, output_dtype


@dataclass(frozen=True)
class Layout:
    """Which rows of a batch belong to which members.

    Attributes:
        groups: ``(members, rows of each)`` of every group, in the order of the rows.
        rest: Rows after them that no member acts on.
    """

    groups: tuple[tuple[int, int], ...]
    rest: int = 0

    #: Number of rows.
    rows: int = field(init=False, compare=False)
    #: Whether all rows are those of one group.
    single: bool = field(init=False, compare=False)
    #: Whether all rows are one member's, so that nothing has to be told apart.
    alone: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        single = not self.rest and len(self.groups) == 1
        object.__setattr__(self, "rows", sum(n * rows for n, rows in self.groups) + self.rest)
        object.__setattr__(self, "single", single)
        object.__setattr__(self, "alone", single and self.groups[0][0] == 1)

    def cut(self, t: Tensor, axis: int) -> list[Tensor]:
        """Cuts a tensor with rows (or several entries per row) along an axis into the groups, then the rest.

        Returns:
            One tensor per group with the axis split into ``(members, entries of each)``; the rest as it is, if there is one.
        """
        per, parts, start = t.shape[axis] // self.rows, [], 0
        for n, rows in self.groups:
            size = n * rows * per
            part = t if size == t.shape[axis] else t.narrow(axis, start, size)
            parts.append(part.unflatten(axis, (n, rows * per)))
            start += size
        if self.rest:
            parts.append(t.narrow(axis, start, self.rest * per))
        return parts

    def joined(self, parts: list[Tensor], axis: int) -> Tensor:
        """Inverts ``cut``."""
        flat = [p.flatten(axis, axis + 1) for p in parts[: len(self.groups)]] + parts[len(self.groups) :]
        return flat[0] if len(flat) == 1 else torch.cat(flat, axis)


@dataclass(frozen=True, eq=False)
class Places:
    """Where rows are in the inputs of sites. Static.

    Attributes:
        at: The axis, by path, and of units (``units.Place``) by theirs; a path that is not there has them on the first axis.
        read: Paths of layers whose weight a module beside them reads.
    """

    at: Mapping[str, Any] = field(default_factory=dict)
    read: frozenset[str] = frozenset()


#: Rows on the first axis everywhere.
FIRST = Places()


@dataclass(frozen=True, eq=False)
class Stacked:
    """A parameter that every member replaces by its own: ``(members, *shape)``."""

    value: Tensor

    shape = property(lambda self: self.value.shape[1:], doc="Shape of one member's.")
    dtype = property(lambda self: self.value.dtype, doc="dtype.")
    device = property(lambda self: self.value.device, doc="Device.")


class Folded:
    """The weight of a population at one site; not changed once made (a dataclass that says so takes thrice the time to make).

    Attributes:
        groups: One expression per group of the layout, the leaves of its methods with a leading member axis.
        base: The expression that the remaining rows meet.
        layout: Which rows are whose.
        places: Where rows are.
        observe: Called with the path and the input at every meeting; what a probe sees.
        read: Whether a module beside the layer reads the weight, so that this module has to run whole.
    """

    __slots__ = ("base", "groups", "layout", "observe", "places", "read")

    def __init__(
        self,
        groups: tuple[Any, ...],
        base: Any,
        layout: Layout,
        places: Places = FIRST,
        observe: Callable[..., None] | None = None,
        read: bool = False,
    ) -> None:
        self.groups, self.base, self.layout = groups, base, layout
        self.places, self.observe, self.read = places, observe, read

    shape = property(lambda self: self.base.shape, doc="Shape of the stored weight.")
    dtype = property(lambda self: self.base.dtype, doc="dtype of the stored weight.")
    device = property(lambda self: self.base.device, doc="Device of the stored weight.")

    def dense(self, site: Site, bias: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the stored weight and bias of a population of one.

        Raises:
            ValueError: If there are several members.
        """
        if not self.layout.alone:
            rule, remedy = "a module reads it, and it has no one value in a population", "use strategy='vmap' or 'loop'"
            raise ValueError(errors.say(f"the weight at {site.path!r}", rule, None, remedy))
        if self.observe is not None:
            self.observe(site.path, None)
        return dense_pair(member(self.groups[0], 0), member(bias.groups[0] if isinstance(bias, Folded) else bias, 0))

    def _values(self) -> list[dict[str, Tensor]]:
        """Returns the values of the call by group, with a leading axis of members; rows are on their first axis."""
        values = self.groups[0].context.values if isinstance(self.groups[0], Adapted) else {}
        cut = {name: self.layout.cut(t, 0) for name, t in values.items()}
        return [{name: parts[i] for name, parts in cut.items()} for i in range(len(self.groups))]

    def _contexts(self) -> list[Any]:
        if not self.groups[0].context.values:
            return [e.context for e in self.groups]
        return [replace(e.context, values=v) for e, v in zip(self.groups, self._values(), strict=True)]

    def meet(self, site: Site, bias: Any, x: Tensor, occurrence: int) -> Tensor:
        """Computes a layer's output for the rows of all members.

        Raises:
            ValueError: If the input does not carry the rows of the population.
        """
        layout, expr = self.layout, self.groups[0]
        if self.observe is not None:
            self.observe(site.path, x)
        axis = self.places.at.get(site.path, 0) if self.places.at else 0
        if self.observe is None or not layout.alone:  # a probe's first calls are to be those of one member as they are
            if x.ndim <= axis or x.shape[axis] % layout.rows:
                refuse(site.path, x, axis, layout)
            if axis == 0 and type(expr) is Adapted and isinstance(expr.base, _PLAIN) and type(bias) is not Folded:
                contexts = self._contexts()
                groups = [(e.leaves, c.at(site.salt, occurrence)) for e, c in zip(self.groups, contexts, strict=True)]
                base = Base(expr.site, expr.base, bias, occurrence, None, expr.leaves)
                y = expr.method.apply_rows(groups, base, x, layout)
                wanted = output_dtype(expr, site, x)
                return y if y.dtype == wanted else y.to(wanted)
        biases = (*bias.groups, bias.base) if isinstance(bias, Folded) else (bias,) * (len(self.groups) + 1)
        groups = self.groups
        if isinstance(expr, Adapted) and expr.context.values:
            groups = tuple(_valued(e, v) for e, v in zip(groups, self._values(), strict=True))
        if layout.alone:
            return meet(member(groups[0], 0), site, member(biases[0], 0), x, occurrence)
        parts = self.layout.cut(x, axis)
        out = [_meet_group(e, b, site, p, axis, occurrence) for e, b, p in zip(groups, biases, parts, strict=False)]
        if self.layout.rest:
            out.append(meet(self.base, site, biases[-1], parts[-1], occurrence))
        return self.layout.joined(out, axis)


register(
    Stacked,
    lambda s: ((s.value,), None),
    lambda _, children: Stacked(children[0]),
    lambda s: ("value",),
)
register(
    Folded,
    lambda f: ((*f.groups, f.base), (f.layout, f.places, f.observe, f.read)),
    lambda static, children: Folded(tuple(children)[:-1], tuple(children)[-1], *static),
    lambda f: (*(f"groups[{i}]" for i in range(len(f.groups))), "base"),
)


#: What a weight is that all members share, as far as a method's batched form is concerned.
_PLAIN = (Tensor, Quantized)


def refuse(path: str, x: Tensor, axis: int, layout: Layout) -> None:
    """Raises ``ValueError`` about an axis that cannot hold the rows of a layout."""
    rule = f"axis {axis} of the input must hold the {layout.rows} rows of the population"
    raise ValueError(errors.say(f"fold at {path!r}", rule, f"shape {tuple(x.shape)}", "use strategy='vmap' or 'loop'"))


def mapped(expr: Any) -> Iterator[Tensor]:
    """Yields the tensors of an expression that have a member axis."""
    if isinstance(expr, Stacked):
        yield expr.value
    elif isinstance(expr, Adapted):
        yield from mapped(expr.base)
        yield from expr.leaves.values()
        if isinstance(expr.context.seed, Tensor) and expr.context.seed.ndim:
            yield expr.context.seed
        yield from expr.context.values.values()


def with_mapped(expr: Any, tensors: Iterator[Tensor]) -> Any:
    """Returns the expression of one member, given its own tensors in the order of ``mapped``."""
    if isinstance(expr, Stacked):
        return next(tensors)
    if not isinstance(expr, Adapted):
        return expr
    base = with_mapped(expr.base, tensors)
    leaves = {name: next(tensors) for name in expr.leaves}
    several = isinstance(expr.context.seed, Tensor) and bool(expr.context.seed.ndim)
    context = replace(expr.context, seed=next(tensors)) if several else expr.context
    if context.values:
        context = replace(context, values={name: next(tensors) for name in context.values})
    return Adapted(base, expr.site, expr.method, leaves, context)


def _valued(expr: Any, values: dict[str, Tensor]) -> Any:
    """Returns an expression in whose contexts the call's values are those of a group."""
    if not isinstance(expr, Adapted):
        return expr
    return Adapted(_valued(expr.base, values), expr.site, expr.method, expr.leaves, replace(expr.context, values=values))


def member(expr: Any, index: int) -> Any:
    """Returns the expression of one member; one that all share is returned as it is."""
    return with_mapped(expr, (t[index] for t in mapped(expr)))


def _meet_group(expr: Any, bias: Any, site: Site, x: Tensor, axis: int, occurrence: int) -> Tensor:
    """Meets the rows of a group's members, the axis before their own being the members'."""
    tensors, own = tuple(mapped(expr)), tuple(mapped(bias))

    def one(tensors: tuple[Tensor, ...], own: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return meet(with_mapped(expr, iter(tensors)), site, with_mapped(bias, iter(own)), x, occurrence)

    if not tensors and not own:
        return meet(expr, site, bias, x.flatten(axis, axis + 1), occurrence).unflatten(axis, x.shape[axis : axis + 2])
    return torch.func.vmap(one, in_dims=(0, 0, axis), out_dims=axis)(tensors, own, x)


def folded_like(expr: Any, other: Folded) -> Folded:
    """Returns a weight that all members share, in the layout of another."""
    return Folded((expr,) * len(other.groups), expr, other.layout, other.places, other.observe, other.read)
