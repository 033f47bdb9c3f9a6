"""A module as a pure function of ``(params, inputs)``; the only file that calls a module.

``functionalize`` copies a module's structure onto the meta device (a *skeleton*: no storage is copied, the module is never
written) and returns it as a static callable with a flat tree of the module's tensors. During a call the skeleton's slots
hold the caller's tensors; after it everything that the call wrote is put back, so nothing outlives a call. At a site whose
weight is an expression the skeleton has no parameter but a stand-in: the layer's ``forward`` meets the expression, and any
other reader sees shape, dtype and device, or the dense value, computed once per call.

Each call takes a skeleton from a pool, so threads never share one, nor do nested calls; traced calls have one of their own.
Imports weights, layers, rng, errors; transformers only if it is imported already.
"""

from __future__ import annotations

import copy
import enum
import functools
import itertools
import operator
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from funcpeft import errors, layers, rng
from funcpeft.weights import Adapted, Quantized, Site, dense, dense_pair, meet

Params = dict[str, Any]


class _Binding:
    """What a site's stand-in reads during one call: the expression, the bias, and how often it was met."""

    __slots__ = ("bias", "expr", "met", "pair", "site")

    def __init__(self, site: Site) -> None:
        self.site, self.expr, self.bias, self.met, self.pair = site, None, None, 0, None

    def bind(self, expr: Any, bias: Tensor | None) -> None:
        self.expr, self.bias, self.met, self.pair = expr, bias, 0, None

    def meet(self, x: Tensor) -> Tensor:
        count = self.met
        self.met = count + 1
        return meet(self.expr, self.site, self.bias, x, count)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        if self.pair is None:
            if self.expr is None:
                raise AttributeError(errors.say(f"the weight at {self.site.path!r}", "it can be read during a call only"))
            self.pair = dense_pair(self.expr, self.bias)
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


#: What holds nothing that a call could write, or what every copy shares.
_ATOMS = (
    *(str, bytes, int, float, complex, type(None), type, enum.Enum, weakref.ref, Tensor, _StandIn, _Binding, torch.dtype),
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


_INDEXED = (dict, list, deque)  # a tuple, which a tracer follows


def _put(holder: Any, index: Any, value: Any) -> None:
    if isinstance(holder, _INDEXED):
        holder[index] = value
    else:
        setattr(holder, index, value)


def _at(holder: Any, index: Any) -> Any:
    return holder[index] if isinstance(holder, _INDEXED) else getattr(holder, index)


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


class _Skeleton:
    """A structure-only copy of the module, and where the tensors of a call go in it.

    A slot is ``(dict, name in it, key)``, of parameters and buffers. An echo is a place of the same tensor under another name
    (``_flat_weights`` of an LSTM), or of a constant, a tensor that is neither; a call gets a copy of it, as it does of buffers.
    """

    def __init__(
        self, template: nn.Module, sites: Iterable[tuple[str, str, Site]], held: Mapping[str, str], traced: bool
    ) -> None:
        self.module = _copy(template)
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
            self._own_slots(f"{prefix}." if prefix else "", m, seen, held)
        holders = [h for m in modules.values() for h in _holders(m, seen)]
        for h, owner in holders:
            self._other_slots(h, owner)
        self.hollow: list[tuple[dict[str, Any], str, _Binding, int]] = []
        placed: set[tuple[int, str]] = set()
        for owner, name, site in sites:
            placed |= self._place(modules[owner], name, site, traced)
        self.slots = [(h, i, key) for h, i, key in self.slots if (id(h), i) not in placed]
        in_tuples = (key for *_, keyed, _ in self.tuples for key, _ in keyed if key is not None)
        self.keys = tuple(dict.fromkeys((*(key for _, _, key in (*self.slots, *self.echoes)), *in_tuples)))
        own = [d for m in {id(m): m for m in modules.values()}.values() for d in (m._parameters, m._buffers)]
        self.record = _Record([*(h for h, _ in holders), *own])
        usual = vars(nn.Module())
        self.first = [(h, index, h[index]) for h, index, _ in self.slots]
        self.first_echoes = [(h, index, _at(h, index)) for h, index, *_ in (*self.echoes, *self.tuples)]
        self.scalars = [
            (m, n, v) for m in modules.values() for n, v in m.__dict__.items() if type(v) in _SCALARS and n not in usual
        ]

    def _own_slots(self, dot: str, m: nn.Module, seen: dict[int, Any], held: Mapping[str, str]) -> None:
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
                        self.copied.add(held.get(dot + name, dot + name))

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

    def taken(self) -> list[Any]:
        """Returns what is in the slots, for ``restore_traced``."""
        return [_at(holder, index) for holder, index, *_ in (*self.slots, *self.echoes, *self.tuples, *self.hollow)]

    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Puts a call's tensors in the slots."""
        for holder, index, key in self.slots:
            holder[index] = values[key]
        for holder, index, key in self.echoes:
            _put(holder, index, values[key])
        for holder, index, keyed, spec in self.tuples:
            _put(holder, index, pytree.tree_unflatten([t if key is None else values[key] for key, t in keyed], spec))
        for own, name, b, which in self.hollow:  # for who lists parameters: right in dtype, device and shape, and NaN
            like: Any = b.bias if which else b.expr
            own[name] = torch.full((), torch.nan, dtype=like.dtype, device=like.device).expand(like.shape)

    def restore(self) -> None:
        """Puts back whatever the call wrote, and lets go of its tensors."""
        for holder, index, old in self.first:
            holder[index] = old
        for holder, index, old in self.first_echoes:
            _put(holder, index, old)
        self.record.restore()
        for b in self.bindings.values():
            b.bind(None, None)

    def restore_traced(self, taken: list[Any]) -> None:
        """Does what ``restore`` does in the way that a tracer follows; it meets scalar attributes, not collections."""
        for (holder, index, *_), old in zip((*self.slots, *self.echoes, *self.tuples, *self.hollow), taken, strict=True):
            _put(holder, index, old)
        for b in self.bindings.values():
            b.bind(None, None)
        for m, name, old in self.scalars:
            if getattr(m, name, None) is not old:
                setattr(m, name, old)


class Model:
    """A module's forward as a pure function of a tree of tensors; made by ``functionalize``.

    Static and hashable by identity. ``model(params, *args, **kwargs)`` returns what the module's forward returns in eval mode.

    Attributes:
        ties: Alias keys of tied tensors, each with the one key under which ``params`` holds the tensor. A tree may carry the
            alias too, which unties it.
        shapes: Shape of every leaf.
        dtypes: dtype of every leaf.
        buffers: Keys of the leaves that are buffers.
        config: The module's ``config``, a copy, or ``None``.
        name: Name of the module's class.
    """

    def __init__(self, module: nn.Module) -> None:
        self.ties, self._shared = _ties(module)
        tensors = {n: t for n, t in _tensors(module).items() if n not in self.ties and n not in self._shared}
        buffers = dict(module.named_buffers(remove_duplicate=False))
        self.shapes = {n: t.shape for n, t in tensors.items()}
        self.dtypes = {n: t.dtype for n, t in tensors.items()}
        self.buffers = frozenset(n for n in tensors if n in buffers)
        self._keys = frozenset(self.shapes)
        self._template = _copy(module)
        self._template.eval()
        self._pools: dict[frozenset[str], list[_Skeleton]] = {}
        self._traced: dict[frozenset[str], _Skeleton] = {}
        self._making = threading.Lock()
        self.name = type(module).__name__
        self.config = getattr(self._template, "config", None)
        self._sites = {s.weight: s for s in _sites(self)}
        self.prepare(frozenset())

    def __repr__(self) -> str:
        count = sum(s.numel() for k, s in self.shapes.items() if k not in self.buffers)
        return f"Model({self.name}, {count:,} parameters in {len(self.shapes)} leaves)"

    def __deepcopy__(self, memo: Any) -> Model:
        return self

    def __call__(self, params: Params, /, *args: Any, **kwargs: Any) -> Any:
        """Returns what the module's forward returns for these tensors.

        Raises:
            KeyError: If a leaf is missing or unknown; the message names it and the nearest known one.
            TypeError: If ``params`` is not a dict, or a leaf is neither a tensor nor an expression.
            ValueError: If a leaf has another shape than the module's.
        """
        return self._run(_itself, params, args, kwargs)[0]

    def call(self, method: str, params: Params, /, *args: Any, **kwargs: Any) -> Any:
        """Calls another method of the module, such as ``"generate"``.

        Raises:
            KeyError: If the module has no such method.
        """
        if not callable(getattr(self._template, method, None)):
            known = [n for n in dir(type(self._template)) if not n.startswith("_")]
            hint = errors.nearest(method, known)
            raise errors.NameMissingError(errors.say(self.name, "the module must have the method", repr(method), hint))
        return self._run(lambda m: getattr(m, method), params, args, kwargs)[0]

    def embed(self, params: Params, ids: Tensor) -> Tensor:
        """Looks up ids in the module's input embedding (``get_input_embeddings``, as transformers' models have it)."""
        if not hasattr(self._template, "get_input_embeddings"):
            raise TypeError(
                errors.say(self.name, "the module must have get_input_embeddings", None, "use a transformers model")
            )
        return self._run(lambda m: m.get_input_embeddings(), params, (ids,), {})[0]

    def stateful(self, params: Params, /, *args: Any, **kwargs: Any) -> tuple[Any, Params]:
        """Returns the output, and new params in which what the forward wrote has its new value.

        That is buffers, and the weight that an ``Embedding`` with ``max_norm`` rescales. All other leaves are the argument's.
        """
        return self._run(_itself, params, args, kwargs, stateful=True)

    # -- structure -----------------------------------------------------------------------------------------------------

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields dotted names and structure-only modules, in the module's order, the root left out."""
        return ((name, m) for name, m in self._template.named_modules() if name)

    @property
    def root(self) -> nn.Module:
        """The structure-only copy of the module; its tensors are on the meta device."""
        return self._template

    def site(self, key: str) -> Site:
        """Returns the static facts of a parameter, given its key in ``params``.

        Raises:
            KeyError: If there is no such parameter.
        """
        if key not in self._sites:
            hint = errors.nearest(key, self._sites)
            raise errors.NameMissingError(errors.say(self.name, "a site must be a parameter of the model", repr(key), hint))
        return self._sites[key]

    @torch.compiler.disable()
    def prepare(self, keys: frozenset[str]) -> None:
        """Makes what a trace needs for params whose expressions are at these keys; ``net.init`` does so."""
        if keys not in self._traced:
            self._traced[keys] = self._make(keys, traced=True)

    # -- the call --------------------------------------------------------------------------------------------------------

    def check(self, params: Params) -> None:
        """Raises ``KeyError`` if leaves are missing or unknown."""
        keys = params.keys()
        if keys == self._keys:
            return
        missing = sorted(self._keys - keys)
        unknown = sorted(k for k in keys - self._keys if k not in self.ties)
        if unknown:
            key, rule = unknown[0], "params must hold the model's leaves only"
            hint = errors.nearest(key, missing or self._keys)
            if key in self._shared:
                hint = f"its module is also that of {self._shared[key]!r}, which is the leaf, so the two cannot differ"
            raise errors.NameMissingError(errors.say(self.name, rule, errors.listed(unknown), hint))
        if missing:
            found, remedy = f"none for {errors.listed(missing)}", "take params from functionalize"
            raise errors.NameMissingError(errors.say(self.name, "params must hold every leaf", found, remedy))

    def _run(
        self, target: Callable[[Any], Any], params: Params, args: Any, kwargs: Any, *, stateful: bool = False
    ) -> tuple[Any, Params]:
        if not isinstance(params, dict):
            found = type(params).__name__
            raise TypeError(errors.say(self.name, "params must be a dict of leaves", found, "take params from functionalize"))
        self.check(params)
        expressions = frozenset(k for k, v in params.items() if not isinstance(v, Tensor))
        for key in expressions:
            if not isinstance(params[key], Adapted | Quantized):
                rule, found = "a leaf must be a tensor or a weight expression", type(params[key]).__name__
                raise TypeError(errors.say(f"params[{key!r}]", rule, found, "take params from functionalize"))
        if torch.compiler.is_dynamo_compiling():
            # the graph does not run this object, but its guards read it: one that no eager call ever touches
            if expressions not in self._traced:
                rule = "what a trace needs must be made before it"
                raise RuntimeError(errors.say(self.name, rule, None, "call net.init or model.prepare for these params outside"))
            return self._run_traced(self._traced[expressions], target, params, args, kwargs, stateful)
        pool = self._pools.setdefault(expressions, [])
        try:
            skeleton = pool.pop()
        except IndexError:
            skeleton = self._make(expressions)
        try:
            values = self._bind(skeleton, params)
            out = target(skeleton.module)(*args, **kwargs)
            return out, self._written(skeleton, params, values) if stateful else params
        finally:
            skeleton.restore()
            pool.append(skeleton)

    def _run_traced(
        self, s: _Skeleton, target: Callable[[Any], Any], params: Params, args: Any, kwargs: Any, stateful: bool
    ) -> tuple[Any, Params]:
        taken = s.taken()
        try:
            values = self._bind(s, params)
            out = target(s.module)(*args, **kwargs)
            return out, self._written(s, params, values) if stateful else params
        finally:
            s.restore_traced(taken)

    def _bind(self, s: _Skeleton, params: Params) -> Params:
        """Puts a call's tensors and expressions into a skeleton, and returns the tensors by key of their slot."""
        values, copies = self._read(s, params), {}
        for key, b in s.bindings.items():
            b.bind(params[key], None if b.site.bias is None else dense(self._leaf(params, b.site.bias)))
        for key in s.keys:
            if key in values:
                continue
            source = key if key in params else self.ties.get(key, key)
            value: Any
            if key in s.sites:  # another attribute holds a site's weight or bias
                binding, which = s.sites[key]
                value = binding.dense()[which]
            else:
                value = s.constants[key] if key in s.constants else dense(params[source])
            if key in s.constants or self.ties.get(key, key) in s.copied:  # a forward may write it
                value = copies[source] = copies[source] if source in copies else value.clone()
            values[key] = self._fitting(source, value)
        s.fill(values)
        return values

    def _fitting(self, key: str, value: Tensor) -> Tensor:
        shape = self.shapes.get(self.ties.get(key, key), value.shape)
        if value.shape != shape:
            raise ValueError(errors.say(f"params[{key!r}]", f"shape must be {tuple(shape)}", tuple(value.shape)))
        return value

    def _leaf(self, params: Params, key: str) -> Any:
        return params[key] if key in params else params[self.ties[key]]

    def _read(self, s: _Skeleton, params: Params) -> Params:
        """Makes dense, weight and bias together, the adapted weights that a module reads by itself."""
        read: Params = {}
        for key, value in params.items():
            if isinstance(value, Adapted) and key not in s.bindings and value.site.bias is not None:
                read[key], read[value.site.bias] = dense_pair(value, dense(self._leaf(params, value.site.bias)))
        return read

    def _written(self, s: _Skeleton, params: Params, values: Params) -> Params:
        """Returns params with the leaves that a forward wrote, in place or by putting another tensor in the slot."""
        new: Params = {}
        for holder, name, key in s.slots:
            now = holder.get(name)
            if now is None or self.ties.get(key, key) not in s.copied:
                continue
            if now is not values[key]:
                new[key] = now
            elif torch.compiler.is_dynamo_compiling() or now.is_inference() or now._version:
                new[key if key in params else self.ties.get(key, key)] = now
        return {**params, **new}

    def _make(self, expressions: frozenset[str], *, traced: bool = False) -> _Skeleton:
        sites = [(*_split(key), site) for key in sorted(expressions) if (site := self.site(key)).met]
        with self._making:  # copying reads the template, which a first copy in another thread may still be settling
            return _Skeleton(self._template, sites, self.ties, traced)


def _itself(module: nn.Module) -> nn.Module:
    return module


def _split(key: str) -> tuple[str, str]:
    owner, _, name = key.rpartition(".")
    return owner, name


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by every name they have."""
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}


def _ties(module: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the aliases of tied tensors, and those that a module under two names makes; each with the first name."""
    modules = dict(module.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    slots: dict[tuple[int, str], str] = {}
    ties: dict[str, str] = {}
    shared: dict[str, str] = {}
    for key, t in _tensors(module).items():
        owner, name = _split(key)
        same = slots.setdefault((id(modules[owner]), name), key)
        if same != key:
            shared[key] = same
        elif first.setdefault(id(t), key) != key:
            ties[key] = first[id(t)]
    return ties, {alias: ties.get(key, key) for alias, key in shared.items()}


def _copy(module: nn.Module) -> nn.Module:
    """Copies a module's structure with every parameter and buffer on the meta device; ties stay ties, constants are shared."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
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


def _sites(model: Model) -> Iterator[Site]:
    """Yields the facts of every parameter of a model."""
    read: dict[str, str | None] = {}
    modules = dict(model.root.named_modules(remove_duplicate=False))
    for prefix, m in modules.items():
        dot = f"{prefix}." if prefix else ""
        for name, bias, _ in layers.read_weights(m):
            read[dot + name] = None if bias is None else dot + bias
    keys = [k for k in model.shapes if k not in model.buffers]
    keys += [alias for alias, key in model.ties.items() if key not in model.buffers]
    for index, key in enumerate(keys):
        held = model.ties.get(key, key)
        owner, name = _split(key)
        module = modules[owner]
        met = name == "weight" and layers.kind_of(module) is not None and key not in read
        bias = read.get(key)
        if met and getattr(module, "bias", None) is not None:
            bias = f"{owner}.bias" if owner else "bias"
        path = owner if name == "weight" and owner else key
        salt = rng.fold_in(0, path) & 0x7FFFFFFF
        yield Site(
            path, key, bias, layers.parameter_kind(module, name), model.shapes[held], model.dtypes[held], index, met, salt
        )


def functionalize(module: nn.Module) -> tuple[Model, Params]:
    """Turns a module into a pure function and a flat tree of its tensors.

    Args:
        module: Any ``nn.Module``. It is never written, and its storage is shared, not copied. The function runs in eval mode.

    Returns:
        ``(model, params)``: ``model(params, *args, **kwargs)`` returns exactly what the module's forward returns;
        ``params`` holds parameters and buffers by dotted name, detached, tied ones once (``model.ties`` maps aliases).

    Raises:
        TypeError: If ``module`` is not an ``nn.Module`` or cannot be copied.
        ValueError: If a parameter or buffer holds no data (on the meta device, or of a lazy module).

    Note:
        State that a forward keeps in attributes starts each call as it was when this function was called. A forward that
        changes one of its *parameters* in place (only ``max_norm`` of torch's layers does) would change the caller's leaf.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(errors.say("functionalize", "an nn.Module is required", type(module).__name__))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, t in tensors.items():
        lazy = nn.parameter.is_lazy(t)
        if lazy or t.is_meta:
            found, remedy = (
                ("a lazy tensor", "call the module once first") if lazy else ("a meta tensor", "load the weights first")
            )
            raise ValueError(errors.say(f"functionalize at {name!r}", "every tensor must hold data", found, remedy))
    register_caches()
    return Model(module), {name: t.detach() for name, t in tensors.items()}


def register_caches() -> None:
    """Registers transformers' cache classes with torch's pytree, so that a default model's output maps under ``vmap``."""
    import sys

    if "transformers" in sys.modules:
        _CacheNode.register()


class _Static:
    """A cache without its tensors: the static part of a node, equal where type, layers and places of tensors are."""

    def __init__(self, cache: Any, places: list[list[tuple[str, Any]]], layers: Iterable[type]) -> None:
        self.cache, self.places = cache, places
        self._facts = (type(cache), tuple(layers), tuple(map(tuple, places)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._facts == other._facts

    def __hash__(self) -> int:
        return hash(self._facts)


class _CacheNode:
    """How transformers' caches are trees: the tensors of each layer, among them those in its dicts (states of Mamba)."""

    done: ClassVar[bool] = False

    @classmethod
    def register(cls) -> None:
        if cls.done:
            return
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

        for node, flatten, unflatten in (
            (DynamicCache, cls.flatten, cls.unflatten),
            (StaticCache, cls.flatten, cls.unflatten),
            (EncoderDecoderCache, cls.flatten_pair, cls.unflatten_pair),
        ):
            if node not in pytree.SUPPORTED_NODES:
                pytree.register_pytree_node(node, flatten, unflatten)
        cls.done = True

    @staticmethod
    def _places(layer: Any) -> list[tuple[str, Any]]:
        """Lists where a layer has tensors: attribute, and key in it if it is a dict."""
        found: list[tuple[str, Any]] = []
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                found.append((name, None))
            elif isinstance(value, dict):
                found += [(name, k) for k, t in value.items() if isinstance(t, Tensor)]
        kept = vars(layer).get("_places", [])
        if any(place not in found and _CacheNode._at(layer, *place) is not None for place in kept):
            return kept  # a transform put its own objects (dims, specs) where the tensors were
        return found

    @staticmethod
    def _at(layer: Any, name: str, k: Any) -> Any:
        return getattr(layer, name) if k is None else getattr(layer, name)[k]

    @staticmethod
    def _with(layer: Any, places: list[tuple[str, Any]], values: Iterable[Any]) -> Any:
        """Copies a layer with values put at places."""
        made = copy.copy(layer)
        for name in dict.fromkeys(n for n, k in places if k is not None):
            setattr(made, name, dict(getattr(layer, name)))
        for (name, k), value in zip(places, values, strict=True):
            if k is None:
                setattr(made, name, value)
            else:
                getattr(made, name)[k] = value
        made._places = places
        return made

    @staticmethod
    def flatten(cache: Any) -> tuple[list[Any], _Static]:
        shell = copy.copy(cache)
        places = [_CacheNode._places(layer) for layer in cache.layers]
        leaves = [_CacheNode._at(layer, *p) for layer, here in zip(cache.layers, places, strict=True) for p in here]
        shell.layers = [_CacheNode._with(x, p, [None] * len(p)) for x, p in zip(cache.layers, places, strict=True)]
        return leaves, _Static(shell, places, map(type, shell.layers))

    @staticmethod
    def unflatten(children: Iterable[Any], static: _Static) -> Any:
        values, cache = list(children), copy.copy(static.cache)
        cache.layers = []
        for layer, places in zip(static.cache.layers, static.places, strict=True):
            cache.layers.append(_CacheNode._with(layer, places, values[: len(places)]))
            values = values[len(places) :]
        return cache

    @staticmethod
    def flatten_pair(cache: Any) -> tuple[list[Any], _Static]:
        shell = copy.copy(cache)
        shell.is_updated = dict(cache.is_updated)
        shell.self_attention_cache = shell.cross_attention_cache = None
        return [cache.self_attention_cache, cache.cross_attention_cache], _Static(shell, [], ())

    @staticmethod
    def unflatten_pair(children: Iterable[Any], static: _Static) -> Any:
        cache = copy.copy(static.cache)
        cache.is_updated = dict(cache.is_updated)
        cache.self_attention_cache, cache.cross_attention_cache = children
        return cache
