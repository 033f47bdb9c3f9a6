"""Units: modules of a skeleton that run as functions of the tensors below them.

A layer's ``forward`` meets its weight, and a folded weight sorts out the rows by itself. What reads adapted parameters in
another way (norms, fused experts, ``MultiheadAttention``) is never handed a leaf with a member axis: its whole ``forward``
runs once per member, under ``vmap`` or, where that fails, in a loop. Imports fold, slots, weights, tree,
caches, errors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from funcpeft import errors
from funcpeft.caches import is_cache
from funcpeft.fold import Folded, Layout, mapped, refuse, with_mapped
from funcpeft.slots import held, put
from funcpeft.tree import map_members
from funcpeft.weights import Adapted, dense, dense_pair

#: Where a key's tensor is in a skeleton: the collection, and the index in it.
Slots = Mapping[str, Sequence[tuple[Any, Any]]]


@dataclass(frozen=True)
class Place:
    """What a unit must know of its module's inputs and outputs.

    Attributes:
        args: Axis of the rows of every leaf of the arguments, ``None`` where a leaf has no rows.
        outs: Axis of the rows of every leaf of the output; the first where there is no entry.
        looped: Whether members run one after the other, because the module does not run under ``vmap``.
    """

    args: tuple[int | None, ...]
    outs: tuple[int | None, ...]
    looped: bool = False


@dataclass(frozen=True, eq=False)
class _Weights:
    """What a run of the module sees: expressions by key, and ``(weight, bias)`` of layers below it by number.

    Their tensors with a member axis, in a fixed order, are ``tensors``; ``of`` returns the weights of one member.
    """

    own: dict[str, Any]
    below: dict[int, tuple[Any, Any]]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors with a member axis."""
        exprs = [*self.own.values(), *(e for pair in self.below.values() for e in pair)]
        return [t for e in exprs for t in mapped(e)]

    def of(self, tensors: Sequence[Tensor]) -> _Weights:
        """Returns the weights of one member, given its tensors."""
        left = iter(tensors)
        own = {k: with_mapped(e, left) for k, e in self.own.items()}
        return _Weights(own, {i: (with_mapped(e, left), with_mapped(b, left)) for i, (e, b) in self.below.items()})

    def member(self, index: int) -> _Weights:
        """Returns the weights of one member."""
        return self.of([t[index] for t in self.tensors])


class Unit:
    """One module that runs whole; holds a call's folded weights by key, and where they belong."""

    def __init__(self, path: str, keys: Sequence[str], slots: Slots, bindings: Sequence[Any], biases: Mapping[str, str]):
        self.path, self.keys, self.slots, self.bindings = path, tuple(keys), slots, tuple(bindings)
        self.biases = biases
        self.weights: dict[str, Folded] = {}

    def bind(self, weights: Mapping[str, Any] | None) -> None:
        """Takes a call's weights of its keys, or lets go of them."""
        self.weights = {} if weights is None else {k: weights[k] for k in self.keys if isinstance(weights[k], Folded)}

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls the module for the rows of all members.

        Raises:
            ValueError: If an argument does not carry the rows of the population, or is a cache, which a forward fills.
        """
        below = {i: b.expr for i, b in enumerate(self.bindings) if isinstance(b.expr, Folded)}
        first = next(iter((*self.weights.values(), *below.values())), None)
        if first is None:
            return forward(*args, **kwargs)
        layout = first.layout
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if layout.alone:
            with self._holding(self._weights(below, 0).member(0)):
                out = forward(*args, **kwargs)
            if first.observe is not None:
                first.observe(self.path, leaves, pytree.tree_leaves(out))
            return out
        if any(is_cache(a) for a in (*args, *kwargs.values())):
            rule, remedy = "a module that runs whole for each member cannot fill a cache", "pass use_cache=False"
            raise ValueError(errors.say(f"fold at {self.path!r}", rule, None, remedy))
        place = first.places.at.get(self.path) or _guessed(leaves, layout)
        return self._run_groups(forward, below, leaves, spec, place, layout)

    def _run_groups(
        self, forward: Any, below: Mapping[int, Folded], leaves: list[Any], spec: Any, place: Place, layout: Layout
    ) -> Any:
        cut = [[leaf] * (len(layout.groups) + 1) for leaf in leaves]
        for i, axis in enumerate(place.args):
            if axis is not None:
                if leaves[i].ndim <= axis or leaves[i].shape[axis] % layout.rows:
                    refuse(self.path, leaves[i], axis, layout)
                cut[i] = layout.cut(leaves[i], axis)

        def call(weights: _Weights, given: Sequence[Any]) -> tuple[list[Any], Any]:
            args, kwargs = pytree.tree_unflatten(list(given), spec)
            with self._holding(weights):
                return pytree.tree_flatten(forward(*args, **kwargs))

        run, outs = _looped if place.looped else _vmapped, []
        out_spec: Any = None
        for g, (n, _) in enumerate(layout.groups):
            found, out_spec = run(call, self._weights(below, g), [c[g] for c in cut], place, n)
            outs.append(found)
        if layout.rest:
            bare = _Weights({k: w.base for k, w in self.weights.items()}, {})
            bare.below.update({i: (w.base, _base(self.bindings[i].bias)) for i, w in below.items()})
            outs.append(call(bare, [c[-1] for c in cut])[0])
        joined = [_joined(layout, list(parts), _out_axis(place, i)) for i, parts in enumerate(zip(*outs, strict=True))]
        return pytree.tree_unflatten(joined, out_spec)

    def _weights(self, below: Mapping[int, Folded], group: int) -> _Weights:
        """Returns the weights of a group, with their member axis."""
        biases = {i: self.bindings[i].bias for i in below}
        own = {k: w.groups[group] for k, w in self.weights.items()}
        return _Weights(own, {i: (w.groups[group], _of_group(biases[i], group)) for i, w in below.items()})

    @contextmanager
    def _holding(self, weights: _Weights) -> Iterator[None]:
        """Puts one member's values where the module and the layers below it look for them, and takes them out again."""
        values = self._values(weights.own)
        saved = [(holder, index, held(holder, index)) for k in values for holder, index in self.slots[k]]
        before = {i: (self.bindings[i].expr, self.bindings[i].bias, self.bindings[i].pair) for i in weights.below}
        try:
            for key, value in values.items():
                for holder, index in self.slots[key]:
                    put(holder, index, value)
            for i, (expr, bias) in weights.below.items():
                self._rebind(i, expr, bias, None)
            yield
        finally:
            for holder, index, value in saved:
                put(holder, index, value)
            for i, now in before.items():
                self._rebind(i, *now)

    def _rebind(self, i: int, expr: Any, bias: Any, pair: Any) -> None:
        b = self.bindings[i]  # how often it was met stays
        b.expr, b.bias, b.pair = expr, bias, pair

    def _values(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Makes one member's expressions dense, a weight together with the bias that belongs to it."""
        values: dict[str, Any] = {}
        for key, expr in own.items():
            bias = self.biases.get(key)
            if isinstance(expr, Adapted) and bias is not None:
                plain = dense(own[bias]) if bias in own else held(*self.slots[bias][0])
                values[key], values[bias] = dense_pair(expr, plain)
        return {**{k: dense(e) for k, e in own.items() if k not in values}, **values}


def _vmapped(call: Any, weights: _Weights, given: list[Any], place: Place, n: int) -> tuple[list[Any], Any]:
    """Runs a group's members under ``vmap``; outputs have the member axis before that of the rows."""

    def one(tensors: list[Tensor], rows: list[Tensor]) -> tuple[list[Any], Any]:
        left = iter(rows)
        leaves = [t if a is None else next(left) for t, a in zip(given, place.args, strict=True)]
        return call(weights.of(tensors), leaves)

    axes = [a for a in place.args if a is not None]
    rows = [t for t, a in zip(given, place.args, strict=True) if a is not None]
    outs, out_spec = map_members(one, (0, axes), weights.tensors, rows)
    for i, t in enumerate(outs):
        if isinstance(t, Tensor):
            axis = _out_axis(place, i)
            outs[i] = t[0] if axis is None else t.movedim(0, axis)
    return outs, out_spec


def _looped(call: Any, weights: _Weights, given: list[Any], place: Place, n: int) -> tuple[list[Any], Any]:
    """Runs a group's members one after the other."""
    found: list[list[Any]] = []
    out_spec: Any = None
    for m in range(n):
        leaves = [t if a is None else t.select(a, m) for t, a in zip(given, place.args, strict=True)]
        flat, out_spec = call(weights.member(m), leaves)
        found.append(flat)
    outs: list[Any] = []
    for i, several in enumerate(zip(*found, strict=True)):
        axis = _out_axis(place, i)
        stacks = isinstance(several[0], Tensor) and axis is not None
        outs.append(torch.stack(several, axis or 0) if stacks else several[0])
    return outs, out_spec


def _out_axis(place: Place, i: int) -> int | None:
    return place.outs[i] if i < len(place.outs) else 0


def _joined(layout: Layout, parts: list[Any], axis: int | None) -> Any:
    return layout.joined(parts, axis) if isinstance(parts[0], Tensor) and axis is not None else parts[0]


def _of_group(bias: Any, group: int) -> Any:
    return bias.groups[group] if isinstance(bias, Folded) else bias


def _base(bias: Any) -> Any:
    return bias.base if isinstance(bias, Folded) else bias


def _guessed(leaves: Sequence[Any], layout: Layout) -> Place:
    """Takes the first axis for that of the rows where its size allows it: what is left without a probe."""
    rows = [isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] > 0 and t.shape[0] % layout.rows == 0 for t in leaves]
    return Place(tuple(0 if r else None for r in rows), ())


@functools.cache
def unit_class(cls: type) -> type:
    """Returns a class whose ``forward`` runs the module as the unit in its ``_unit``."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_unit"].run(functools.partial(cls.forward, self), args, kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def make_unit(module: nn.Module, unit: Unit) -> None:
    """Turns a module of a skeleton into a unit."""
    module.__class__ = unit_class(type(module))
    module.__dict__["_unit"] = unit
