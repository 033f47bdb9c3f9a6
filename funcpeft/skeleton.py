"""Skeletons: structure-only copies of a module into which a call puts its tensors, and from which it takes all it wrote.

A skeleton has its parameters and buffers on the meta device. At a site whose weight is an expression it has no parameter but
a stand-in: the layer's ``forward`` meets the expression, and any other reader sees shape, dtype and device, or the dense
value, computed once per call. Imports fold, units, blocks,
weights, layers, errors.
"""

from __future__ import annotations

import copy
import enum
import functools
import itertools
import operator
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from funcpeft import errors, layers
from funcpeft.blocks import Block, inside, make_block
from funcpeft.fold import Folded
from funcpeft.slots import held, put
from funcpeft.units import Unit, make_unit
from funcpeft.weights import Site, dense_pair, meet


class _Binding:
    """What a site's stand-in reads during one call: the expression, the bias, and how often it was met."""

    __slots__ = ("bias", "expr", "met", "pair", "site")

    def __init__(self, site: Site) -> None:
        self.site, self.expr, self.bias, self.met, self.pair = site, None, None, 0, None

    def bind(self, expr: Any, bias: Tensor | None) -> None:
        self.expr, self.bias, self.met, self.pair = expr, bias, 0, None

    def meet(self, x: Tensor) -> Tensor:
        count, expr = self.met, self.expr
        self.met = count + 1
        if type(expr) is Folded:
            return expr.meet(self.site, self.bias, x, count)
        return meet(expr, self.site, self.bias, x, count)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        if self.pair is None:
            if self.expr is None:
                raise AttributeError(errors.say(f"the weight at {self.site.path!r}", "it can be read during a call only"))
            folded = isinstance(self.expr, Folded)
            self.pair = self.expr.dense(self.site, self.bias) if folded else dense_pair(self.expr, self.bias)
        return self.pair


class _StandIn:
    """Stands where a site's weight or bias was: cheap facts at once, the dense value for every other use.

    It passes ``isinstance(weight, torch.Tensor)``. A tracer would take it for a tensor (and torch 2.13's swaps the operands of
    ``weight @ x`` for any object like it), so traced skeletons have properties instead, and the graph drops what is not used.
    """

    __slots__ = ("_binding", "_which")
    __class__ = property(lambda self: Tensor)  # type: ignore[assignment]  # what a proxy is for

    def __init__(self, binding: _Binding, which: int) -> None:
        self._binding, self._which = binding, which

    def _value(self) -> Any:
        return self._binding.dense()[self._which]

    def _source(self) -> Any:
        return self._binding.bias if self._which else self._binding.expr

    dtype = property(lambda self: self._source().dtype)
    device = property(lambda self: self._source().device)
    shape = property(lambda self: self._source().shape)
    ndim = property(lambda self: len(self._source().shape))
    is_meta = property(lambda self: self._source().device.type == "meta")
    is_cuda = property(lambda self: self._source().device.type == "cuda")
    _is_param = False

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # who probes for a protocol is told by the class
            raise AttributeError(name)
        return getattr(self._value(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self._value()[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._value())

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        return bool(self._value())

    def __hash__(self) -> int:
        return id(self)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*(_plain(a) for a in args), **{k: _plain(v) for k, v in (kwargs or {}).items()})


def _plain(value: Any) -> Any:
    """Returns a value with the stand-ins in it, also those in lists and tuples, made dense."""
    kind = type(value)
    if kind is _StandIn:
        return value._value()
    return kind(_plain(v) for v in value) if kind is list or kind is tuple else value


def _operators() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yields the operators of a tensor that read its value, reflected ones too."""

    def forward(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *others: f(self._value(), *(_plain(o) for o in others))

    def reflected(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: f(_plain(other), self._value())

    for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"):
        f = getattr(operator, name)
        yield f"__{name}__", forward(f)
        yield f"__r{name}__", reflected(f)
    for name in ("neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge"):
        yield f"__{name}__", forward(getattr(operator, name))
    yield "__float__", forward(float)
    yield "__int__", forward(int)


for _name, _f in _operators():
    setattr(_StandIn, _name, _f)


@functools.cache
def _meeting(base: type) -> type:
    """Makes the class whose ``forward`` takes the place of a layer class's own in the method resolution order."""

    def forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.__dict__["_binding"].meet(*args, *kwargs.values())

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


def _bias_of(module: Any) -> Any:
    binding = module.__dict__["_binding"]
    return None if binding.site.bias is None else binding.dense()[1]


#: What a site's weight and bias are where a tracer reads them.
_TRACED = {"weight": property(lambda self: self.__dict__["_binding"].dense()[0]), "bias": property(_bias_of)}
_CLASSES: dict[tuple[type, bool], type] = {}


def _site_class(cls: type, base: type, traced: bool) -> type:
    """Returns ``cls`` with ``base.forward`` replaced; a subclass that calls ``super().forward`` reaches it too."""
    if (cls, traced) not in _CLASSES:
        members = {"__module__": cls.__module__, **(_TRACED if traced else {})}
        meeting = _meeting(base)
        _CLASSES[cls, traced] = type(cls.__name__, (meeting,) if cls is base else (cls, meeting), members)
    return _CLASSES[cls, traced]


@functools.cache
def _padded(base: type) -> type:
    """Makes the class that looks up ids as its kind does, in place of ``torch.nn.Embedding`` with padding."""

    def forward(self: Any, input: Tensor) -> Tensor:
        return self.__dict__["_kind"].product(input, self.weight, None)

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


@functools.cache
def _padded_class(cls: type, base: type) -> type:
    bases = (_padded(base),) if cls is base else (cls, _padded(base))
    return type(cls.__name__, bases, {"__module__": cls.__module__})


def _mend_padding(module: nn.Module) -> None:
    """Gives an embedding with padding its kind's product, whose gradient is right under ``vmap`` too."""
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        found = layers.kind_of(module)
        if found is not None:
            module.__class__ = _padded_class(type(module), found[1])
            module.__dict__["_kind"] = found[0]


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
        _StandIn,
        _Binding,
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
        modules = dict(self.module.named_modules(remove_duplicate=False))
        self.slots: list[tuple[dict[str, Any], str, str]] = []
        self.echoes: list[tuple[Any, Any, str]] = []
        self.tuples: list[tuple[Any, Any, list[Any], Any]] = []
        self.constants: dict[str, Tensor] = {}
        self.copied: set[str] = set()
        self.bindings: dict[str, _Binding] = {}
        self.sites: dict[str, tuple[_Binding, int]] = {}
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
        self.hollow: list[tuple[dict[str, Any], str, _Binding, int]] = []
        placed: set[tuple[int, str]] = set()
        for m in {id(m): m for m in modules.values()}.values():
            _mend_padding(m)
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
        binding = self.bindings[site.weight] = _Binding(site)
        self.sites |= {k: (binding, which) for which, k in enumerate((site.weight, site.bias)) if k is not None}
        found = layers.kind_of(module)
        assert found is not None
        module.__class__ = _site_class(type(module), found[1], traced)
        module.__dict__["_binding"] = binding
        names = (name, "bias") if site.bias is not None else (name,)
        own: dict[str, Any] = module._parameters
        for which, n in enumerate(names):
            if traced:
                self.hollow.append((own, n, binding, which))
            else:
                own[n] = _StandIn(binding, which)
        return {(id(own), n) for n in names}

    def _units(self, modules: Mapping[str, nn.Module], read: list[Site]) -> list[Unit]:
        """Turns the modules that read folded weights by themselves into units; an inner one is part of the outer one."""
        reader = lambda site: split(site.reader)[0] if site.met else site.reader  # noqa: E731
        paths = {reader(site) for site in read}
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
