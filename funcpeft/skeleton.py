"""Skeletons: structure-only copies of a module into which a call puts its tensors, and from which it takes all it wrote.

A skeleton has its parameters and buffers on the meta device. At a site whose weight is an expression it has no parameter but
a stand-in: the layer's ``forward`` meets the expression, and any other reader sees shape, dtype and device, or the dense
value, computed once per call (``standins``). Imports standins, units, blocks, layers, errors.
"""

from __future__ import annotations

import copy
import enum
import itertools
import operator
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from funcpeft import errors, layers
from funcpeft.blocks import Block, inside, make_block
from funcpeft.slots import held, put
from funcpeft.standins import Binding, StandIn, mend_padding, site_class
from funcpeft.units import Unit, make_unit
from funcpeft.weights import Site

#: What holds nothing that a call could write, or what every copy shares.
_ATOMS = (
    *(
        str,
        bytes,
        int,
        float,
        complex,
        type(None),
        type,
        enum.Enum,
        weakref.ref,
        Tensor,
        StandIn,
        Binding,
        Unit,
        Block,
        torch.dtype,
    ),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
)


def _holders(root: Any, seen: dict[int, Any]) -> Iterator[tuple[Any, Any]]:
    """Yields the collections reachable from an object, each once, with the object whose attributes it is, if it is."""
    stack: list[tuple[Any, Any]] = [(vars(root), root)]
    while stack:
        item, owner = stack.pop()
        if id(item) in seen or isinstance(item, _ATOMS):
            continue
        seen[id(item)] = item
        if isinstance(item, dict | list | deque | set | tuple | frozenset):
            yield item, owner
            stack += [(value, None) for value in (item.values() if isinstance(item, dict) else item)]
        elif isinstance(item, nn.Module) or (hasattr(item, "__dict__") and not hasattr(item, "__deepcopy__")):
            stack.append((vars(item), item))


class _Record:
    """The content of every collection of a module, by which what a forward wrote is found and put back."""

    def __init__(self, holders: Iterable[Any]) -> None:
        mutable = [h for h in holders if not isinstance(h, tuple | frozenset)]
        self.empty = [h for h in mutable if not h]
        self.dicts = [(h, dict(h)) for h in mutable if h and isinstance(h, dict)]
        self.views = [h.values() for h, _ in self.dicts]
        self.values = tuple(itertools.chain.from_iterable(self.views))
        self.lists = [(h, tuple(h)) for h in mutable if h and isinstance(h, list | deque)]
        self.sets = [(h, frozenset(h)) for h in mutable if h and isinstance(h, set)]

    def restore(self) -> None:
        if any(self.empty):
            for h in self.empty:
                h.clear()
        values = tuple(itertools.chain.from_iterable(self.views))
        if len(values) != len(self.values) or not all(map(operator.is_, values, self.values)):
            for h, content in self.dicts:
                h.clear()
                h.update(content)
        for h, values in self.lists:
            if len(h) != len(values) or not all(map(operator.is_, h, values)):
                h.clear()
                h.extend(values)
        for h, content in self.sets:
            if h != content:
                h.clear()
                h.update(content)


_SCALARS = (bool, int, float, str, type(None))


class Skeleton:
    """A structure-only copy of the module, and where the tensors of a call go in it.

    A slot is ``(dict, name in it, key)``, of parameters and buffers. An echo is a place of the same tensor under another name
    (``_flat_weights`` of an LSTM), or of a constant, a tensor that is neither; a call gets a copy of it, as it does of buffers.
    """

    def __init__(
        self,
        template: nn.Module,
        sites: Iterable[tuple[str, str, Site]],
        ties: Mapping[str, str],
        traced: bool,
        read: Iterable[Site] = (),
        blocks: Sequence[str] = (),
        lend: Any = None,
    ) -> None:
        self.module = structure(template)
        if traced:
            record_outputs(self.module)
        modules = dict(self.module.named_modules(remove_duplicate=False))
        self.slots: list[tuple[dict[str, Any], str, str]] = []
        self.echoes: list[tuple[Any, Any, str]] = []
        self.tuples: list[tuple[Any, Any, list[Any], Any]] = []
        self.constants: dict[str, Tensor] = {}
        self.copied: set[str] = set()
        self.bindings: dict[str, Binding] = {}
        self.sites: dict[str, tuple[Binding, int]] = {}
        self._names: dict[int, str] = {}
        seen: dict[int, Any] = {}
        for _ in _holders(template, seen):  # what a copy shares with its original (loggers, say) is not its own
            pass
        seen |= {id(m): m for m in modules.values()}
        for prefix, m in modules.items():
            self._own_slots(f"{prefix}." if prefix else "", m, seen, ties)
        holders = [h for m in modules.values() for h in _holders(m, seen)]
        for h, owner in holders:
            self._other_slots(h, owner)
        self.hollow: list[tuple[dict[str, Any], str, Binding, int]] = []
        placed: set[tuple[int, str]] = set()
        for m in {id(m): m for m in modules.values()}.values():
            mend_padding(m)
        for owner, name, site in sites:
            placed |= self._place(modules[owner], name, site, traced)
        self.slots = [(h, i, key) for h, i, key in self.slots if (id(h), i) not in placed]
        in_tuples = (key for *_, keyed, _ in self.tuples for key, _ in keyed if key is not None)
        self.keys = tuple(dict.fromkeys((*(key for _, _, key in (*self.slots, *self.echoes)), *in_tuples)))
        self.units = self._units(modules, list(read))
        self.blocks = {path: self._block(path, modules[path], lend) for path in blocks}
        own = [d for m in {id(m): m for m in modules.values()}.values() for d in (m._parameters, m._buffers)]
        self.record = _Record([*(h for h, _ in holders), *own])
        for block in self.blocks.values():
            inner = {id(d): d for m in block.module.modules() for d in (m._parameters, m._buffers)}
            block.record = _Record([*(h for h, _ in _holders(block.module, {})), *inner.values()])
        usual = vars(nn.Module())
        self.first = [(h, index, h[index]) for h, index, _ in self.slots]
        self.first_echoes = [(h, index, held(h, index)) for h, index, *_ in (*self.echoes, *self.tuples)]
        self.scalars = [
            (m, n, v) for m in modules.values() for n, v in m.__dict__.items() if type(v) in _SCALARS and n not in usual
        ]

    def _own_slots(self, dot: str, m: nn.Module, seen: dict[int, Any], ties: Mapping[str, str]) -> None:
        rescales = isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None
        for d in (m._parameters, m._buffers):
            if id(d) in seen:  # a module under two names has the slots of its first
                continue
            seen[id(d)] = d
            for name, t in d.items():
                if t is not None:
                    self._names.setdefault(id(t), dot + name)
                    self.slots.append((d, name, dot + name))
                    if d is m._buffers or rescales:
                        self.copied.add(ties.get(dot + name, dot + name))

    def _other_slots(self, holder: Any, owner: Any) -> None:
        if isinstance(holder, set | tuple | frozenset):
            return
        place = holder if owner is None else owner
        for index, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if isinstance(value, Tensor):
                self.echoes.append((place, index, self._key_of(value)))
            elif isinstance(value, tuple):
                leaves, spec = pytree.tree_flatten(value)
                if any(isinstance(t, Tensor) for t in leaves):
                    keyed = [(self._key_of(t), None) if isinstance(t, Tensor) else (None, t) for t in leaves]
                    self.tuples.append((place, index, keyed, spec))

    def _key_of(self, t: Tensor) -> str:
        if id(t) not in self._names:
            key = self._names[id(t)] = f"<constant {len(self.constants)}>"
            self.constants[key] = t
        return self._names[id(t)]

    def _place(self, module: nn.Module, name: str, site: Site, traced: bool) -> set[tuple[int, str]]:
        """Turns a layer into a site: stand-ins in place of its parameters, which are returned, ``forward`` meets."""
        binding = self.bindings[site.weight] = Binding(site)
        self.sites |= {k: (binding, which) for which, k in enumerate((site.weight, site.bias)) if k is not None}
        found = layers.kind_of(module)
        assert found is not None
        module.__class__ = site_class(type(module), found[1], traced)
        module.__dict__["_binding"] = binding
        names = (name, "bias") if site.bias is not None else (name,)
        own: dict[str, Any] = module._parameters
        for which, n in enumerate(names):
            if traced:
                self.hollow.append((own, n, binding, which))
            else:
                own[n] = StandIn(binding, which)
        return {(id(own), n) for n in names}

    def _units(self, modules: Mapping[str, nn.Module], read: list[Site]) -> list[Unit]:
        """Turns the modules that read folded weights by themselves into units; an inner one is part of the outer one."""
        paths = {split(site.reader)[0] if site.met else site.reader for site in read}
        outer = [p for p in sorted(paths) if not any(p != q and (not q or p.startswith(f"{q}.")) for q in paths)]
        made: list[Unit] = []
        for path in outer:
            mine = [s for s in read if inside(s.reader, path) and not s.met]
            places: dict[str, list[tuple[Any, Any]]] = {}
            for holder, index, key in (*self.slots, *self.echoes):
                places.setdefault(key, []).append((holder, index))
            below = [b for key, b in self.bindings.items() if inside(split(key)[0], path)]
            biases = {s.weight: s.bias for s in mine if s.bias is not None}
            unit = Unit(path, [s.weight for s in mine], places, below, biases)
            make_unit(modules[path], unit)
            made.append(unit)
        return made

    def _block(self, path: str, module: nn.Module, lend: Any) -> Block:
        """Turns a module into a block, and returns the part of the skeleton that belongs to it."""
        own = {id(d) for m in module.modules() for d in (m._parameters, m._buffers)}
        lists = {id(h) for h, _ in _holders(module, {})} | {id(m) for m in module.modules()}
        slots = [(h, i) for h, i, _ in self.slots if id(h) in own] + [(h, i) for h, i, _ in self.echoes if id(h) in lists]
        bindings = [b for key, b in self.bindings.items() if inside(split(key)[0], path)]
        units = [u for u in self.units if inside(u.path, path)]
        block = Block(path, module, slots, bindings, units, lend)
        make_block(block)
        return block

    def taken(self) -> list[Any]:
        """Returns what is in the slots, for ``restore_traced``."""
        return [held(holder, index) for holder, index, *_ in (*self.slots, *self.echoes, *self.tuples, *self.hollow)]

    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Puts a call's tensors in the slots."""
        for holder, index, key in self.slots:
            holder[index] = values[key]
        for holder, index, key in self.echoes:
            put(holder, index, values[key])
        for holder, index, keyed, spec in self.tuples:
            put(holder, index, pytree.tree_unflatten([t if key is None else values[key] for key, t in keyed], spec))
        for own, name, b, which in self.hollow:  # for who lists parameters: right in dtype, device and shape, and NaN
            like: Any = b.bias if which else b.expr
            own[name] = torch.full((), torch.nan, dtype=like.dtype, device=like.device).expand(like.shape)

    def restore(self) -> None:
        """Puts back whatever the call wrote, and lets go of its tensors."""
        for holder, index, old in self.first:
            holder[index] = old
        for holder, index, old in self.first_echoes:
            put(holder, index, old)
        self.record.restore()
        self._let_go()

    def _let_go(self) -> None:
        for b in self.bindings.values():
            b.bind(None, None)
        for unit in self.units:
            unit.bind(None)

    def restore_traced(self, taken: list[Any]) -> None:
        """Does what ``restore`` does in the way that a tracer follows; it meets scalar attributes, not collections."""
        for (holder, index, *_), old in zip((*self.slots, *self.echoes, *self.tuples, *self.hollow), taken, strict=True):
            put(holder, index, old)
        self._let_go()
        for m, name, old in self.scalars:
            if getattr(m, name, None) is not old:
                setattr(m, name, old)


def split(key: str) -> tuple[str, str]:
    """Returns the owner's path and the name of a key."""
    owner, _, name = key.rpartition(".")
    return owner, name


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by every name they have."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}


def record_outputs(module: nn.Module) -> None:
    """Installs the hooks by which a model of transformers records hidden states, which its forward cannot do in a trace."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    install = getattr(capturing, "maybe_install_capturing_hooks", None)
    for m in module.modules():
        if install is not None and getattr(m, "_can_record_outputs", None):
            install(m)


def structure(module: nn.Module, replaced: Mapping[int, nn.Module] | None = None) -> nn.Module:
    """Copies a module's structure with every parameter and buffer on the meta device; ties stay ties, constants are shared.

    ``replaced`` maps ids of submodules to modules that take their places in the copy.
    """
    memo: dict[int, Any] = dict(replaced or {})
    skipped = {id(t) for m in module.modules() if id(m) in memo for t in (*m.parameters(), *m.buffers())}
    for p in module.parameters():
        if id(p) in skipped:
            continue
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    for holder, _ in _holders(module, {}):
        for t in holder.values() if isinstance(holder, dict) else holder:
            if isinstance(t, Tensor):
                memo.setdefault(id(t), t)
    try:
        return copy.deepcopy(module, memo)
    except Exception as e:
        found = f"{type(e).__name__}: {e}"
        raise TypeError(errors.say(f"functionalize({type(module).__name__})", "the module must be copyable", found)) from e
