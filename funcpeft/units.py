"""Units: modules of a skeleton that run as functions of the tensors below them.

A layer's ``forward`` meets its weight, and a folded weight sorts out the rows by itself. What reads adapted parameters in
another way (norms, fused experts, ``MultiheadAttention``) is never handed a leaf with a member axis: its whole ``forward``
runs once per member, under ``vmap`` or, where that fails, in a loop. Imports fold, weights.
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
from funcpeft.weights import Adapted, dense, dense_pair

#: Where a key's tensor is in a skeleton: the collection, and the index in it.
Places = Mapping[str, Sequence[tuple[Any, Any]]]


@dataclass(frozen=True)
class Place:
    """What a unit must know of its module's inputs and outputs.

    Attributes:
        args: Axis of the rows of every leaf of the arguments, ``None`` where a leaf has no rows.
        outs: Axis of the rows of every leaf of the output.
        looped: Whether members run one after the other, because the module does not run under ``vmap``.
    """

    args: tuple[int | None, ...]
    outs: tuple[int | None, ...]
    looped: bool = False


#: Stands for a tensor among the leaves of an output.
_TENSOR = object()


class Unit:
    """One module that runs whole; holds a call's folded weights by key, and where they belong."""

    def __init__(self, path: str, keys: Sequence[str], places: Places, bindings: Sequence[Any], biases: Mapping[str, str]):
        self.path, self.keys, self.places, self.bindings = path, tuple(keys), places, tuple(bindings)
        self.biases = biases
        self.weights: dict[str, Folded] = {}

    def bind(self, weights: Mapping[str, Any] | None) -> None:
        """Takes a call's weights of its keys, or lets go of them."""
        self.weights = {} if weights is None else {k: weights[k] for k in self.keys if isinstance(weights[k], Folded)}

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls the module for the rows of all members."""
        held = {i: b.expr for i, b in enumerate(self.bindings) if isinstance(b.expr, Folded)}
        first = next(iter((*self.weights.values(), *held.values())), None)
        if first is None:
            return forward(*args, **kwargs)
        layout, observe = first.layout, first.observe
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if layout.alone:
            with self._holding(self._of(0, 0), self._bound_of(held, 0, 0)):
                out = forward(*args, **kwargs)
            if observe is not None:
                observe(self.path, leaves, pytree.tree_leaves(out))
            return out
        if any(is_cache(a) for a in (*args, *kwargs.values())):
            rule, remedy = "a module that runs whole for each member cannot fill a cache", "pass use_cache=False"
            raise ValueError(errors.say(f"fold at {self.path!r}", rule, None, remedy))
        place = first.places.at.get(self.path) or _guessed(leaves, layout)
        for leaf, axis in zip(leaves, place.args, strict=True):
            if axis is not None and (leaf.ndim <= axis or leaf.shape[axis] % layout.rows):
                refuse(self.path, leaf, axis, layout)
        cut = [[leaf] if axis is None else layout.cut(leaf, axis) for leaf, axis in zip(leaves, place.args, strict=True)]
        outs: list[list[Any]] = []
        spec_out: Any = None
        for group, (n, _) in enumerate(layout.groups):
            given = [c[0] if a is None else c[group] for c, a in zip(cut, place.args, strict=True)]
            run = self._looped if place.looped else self._vmapped
            found, spec_out = run(forward, spec, given, place, group, n, held)
            outs.append(found)
        if layout.rest:
            given = [c[0] if a is None else c[-1] for c, a in zip(cut, place.args, strict=True)]
            bound = {i: (w.base, _base_of(self.bindings[i].bias)) for i, w in held.items()}
            out = self._call(forward, spec, given, {k: w.base for k, w in self.weights.items()}, bound)
            outs.append(pytree.tree_leaves(out))
        return pytree.tree_unflatten(
            [_joined(layout, list(o), a) for o, a in zip(zip(*outs, strict=True), _outs(place, outs), strict=True)], spec_out
        )

    def _of(self, group: int, index: int) -> dict[str, Any]:
        return {k: _at(w.groups[group], index) for k, w in self.weights.items()}

    def _bound_of(self, held: Mapping[int, Folded], group: int, index: int) -> dict[int, Any]:
        return {i: (_at(w.groups[group], index), _bias_at(self.bindings[i].bias, group, index)) for i, w in held.items()}

    def _call(self, forward: Callable[..., Any], spec: Any, leaves: Sequence[Any], own: Mapping[str, Any], bound: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(list(leaves), spec)
        with self._holding(own, bound):
            return forward(*args, **kwargs)

    @contextmanager
    def _holding(self, own: Mapping[str, Any], bound: Mapping[int, Any]) -> Iterator[None]:
        """Puts one member's values where the module and the layers below it look for them, and takes them out again."""
        values: dict[str, Tensor] = {}
        for key, expr in own.items():
            bias = self.biases.get(key)
            if isinstance(expr, Adapted) and bias is not None:
                plain = dense(own[bias]) if bias in own else _held(self.places[bias])
                values[key], values[bias] = dense_pair(expr, plain)
        values = {**{k: dense(e) for k, e in own.items() if k not in values}, **values}
        saved = [(holder, index, _get(holder, index)) for k in values for holder, index in self.places[k]]
        before = {i: (self.bindings[i].expr, self.bindings[i].bias, self.bindings[i].pair) for i in bound}
        try:
            for key, value in values.items():
                for holder, index in self.places[key]:
                    _set(holder, index, value)
            for i, (expr, bias) in bound.items():
                b = self.bindings[i]
                b.expr, b.bias, b.pair = expr, bias, None
            yield
        finally:
            for holder, index, value in saved:
                _set(holder, index, value)
            for i, (expr, bias, pair) in before.items():
                b = self.bindings[i]
                b.expr, b.bias, b.pair = expr, bias, pair

    def _vmapped(
        self, forward: Any, spec: Any, given: list[Any], place: Place, group: int, n: int, held: Mapping[int, Folded]
    ) -> tuple[list[Any], Any]:
        exprs = {k: w.groups[group] for k, w in self.weights.items()}
        below = {i: (w.groups[group], _bias_of(self.bindings[i].bias, group)) for i, w in held.items()}
        tensors = tuple(tuple(mapped(e)) for e in exprs.values())
        under = tuple((tuple(mapped(e)), tuple(mapped(b))) for e, b in below.values())
        axes = [a for a in place.args if a is not None]
        rows = [t for t, a in zip(given, place.args, strict=True) if a is not None]
        spec_out: Any = None
        plain: list[Any] = []

        def one(tensors: Any, under: Any, rows: Any) -> list[Tensor]:
            nonlocal spec_out, plain
            own = {k: with_mapped(e, iter(t)) for (k, e), t in zip(exprs.items(), tensors, strict=True)}
            bound = {
                i: (with_mapped(e, iter(t)), with_mapped(b, iter(u)))
                for (i, (e, b)), (t, u) in zip(below.items(), under, strict=True)
            }
            left = iter(rows)
            leaves = [t if a is None else next(left) for t, a in zip(given, place.args, strict=True)]
            found, spec_out = pytree.tree_flatten(self._call(forward, spec, leaves, own, bound))
            plain = [_TENSOR if isinstance(t, Tensor) else t for t in found]
            return [t for t in found if isinstance(t, Tensor)]

        made = iter(torch.func.vmap(one, in_dims=(0, 0, axes))(tensors, under, rows))
        outs: list[Any] = []
        for i, p in enumerate(plain):
            axis = place.outs[i] if i < len(place.outs) else 0
            outs.append(next(made) if p is _TENSOR else p)
            if isinstance(outs[-1], Tensor) and axis is not None:
                outs[-1] = outs[-1].movedim(0, axis)
        return outs, spec_out

    def _looped(
        self, forward: Any, spec: Any, given: list[Any], place: Place, group: int, n: int, held: Mapping[int, Folded]
    ) -> tuple[list[Any], Any]:
        found: list[list[Any]] = []
        spec_out: Any = None
        for m in range(n):
            leaves = [t if a is None else t.select(a, m) for t, a in zip(given, place.args, strict=True)]
            out = self._call(forward, spec, leaves, self._of(group, m), self._bound_of(held, group, m))
            flat, spec_out = pytree.tree_flatten(out)
            found.append(flat)
        outs: list[Any] = []
        for i, several in enumerate(zip(*found, strict=True)):
            axis = place.outs[i] if i < len(place.outs) else 0
            several_ = list(several)
            outs.append(
                torch.stack(several_, axis or 0) if isinstance(several_[0], Tensor) and axis is not None else several_[0]
            )
        return outs, spec_out


def _at(expr: Any, index: int) -> Any:
    return with_mapped(expr, (t[index] for t in mapped(expr)))


def _bias_of(bias: Any, group: int) -> Any:
    return bias.groups[group] if isinstance(bias, Folded) else bias


def _bias_at(bias: Any, group: int, index: int) -> Any:
    return _at(_bias_of(bias, group), index)


def _base_of(bias: Any) -> Any:
    return bias.base if isinstance(bias, Folded) else bias


def _outs(place: Place, outs: list[list[Any]]) -> list[int | None]:
    return [place.outs[i] if i < len(place.outs) else 0 for i in range(len(outs[0]))]


def _joined(layout: Layout, parts: list[Any], axis: int | None) -> Any:
    return layout.joined(parts, axis) if isinstance(parts[0], Tensor) and axis is not None else parts[0]


def _guessed(leaves: Sequence[Any], layout: Layout) -> Place:
    """Takes the first axis for that of the rows where its size allows it: what is left without a probe."""
    rows = [isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] > 0 and t.shape[0] % layout.rows == 0 for t in leaves]
    return Place(tuple(0 if r else None for r in rows), ())


def _get(holder: Any, index: Any) -> Any:
    return getattr(holder, index) if isinstance(index, str) and not isinstance(holder, dict) else holder[index]


def _set(holder: Any, index: Any, value: Any) -> None:
    if isinstance(index, str) and not isinstance(holder, dict):
        setattr(holder, index, value)
    else:
        holder[index] = value


def _held(places: Sequence[tuple[Any, Any]]) -> Tensor:
    return _get(*places[0])


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
