"""A module as a pure function of ``(params, inputs)``; the only file that calls a module.

``functionalize`` copies a module's structure onto the meta device (a *skeleton*: no storage is copied, the module is never
written) and returns it as a static callable with a flat tree of the module's tensors. During a call the skeleton's slots
hold the caller's tensors; after it everything that the call wrote is put back, so nothing outlives a call. At a site whose
weight is an expression the skeleton has no parameter but a stand-in: the layer's ``forward`` meets the expression, and any
other reader sees shape, dtype and device, or the dense value, computed once per call.

Each call takes a skeleton from a pool, so threads never share one; traced calls have one of their own. Imports weights,
layers, tree, errors.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from funcpeft import errors, layers, rng
from funcpeft.weights import Adapted, Expression, Quantized, Site, dense, dense_pair, meet

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
            self.pair = dense_pair(self.expr, self.bias)
        return self.pair


class _StandIn:
    """Stands where a site's weight or bias was: cheap facts at once, the dense value for every other use."""

    __slots__ = ("_binding", "_which")

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
    requires_grad = False

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self._value()[index]

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def value(a: Any) -> Any:
            if isinstance(a, _StandIn):
                return a._value()
            return type(a)(value(b) for b in a) if isinstance(a, list | tuple) else a

        return func(*(value(a) for a in args), **{k: value(v) for k, v in (kwargs or {}).items()})


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: _StandIn, *others: Any) -> Any:
        return getattr(self._value(), name)(*(o._value() if isinstance(o, _StandIn) else o for o in others))

    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "matmul", "rmatmul", "truediv", "rtruediv", "pow", "neg"):
    setattr(_StandIn, f"__{_name}__", _operator(f"__{_name}__"))


def _meeting(base: type) -> type:
    """Makes the class whose ``forward`` takes the place of a layer class's own in the method resolution order."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.__dict__["_binding"].meet(x)

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


_MEETING: dict[type, type] = {}


def _site_class(cls: type, base: type) -> type:
    """Returns ``cls`` with ``base.forward`` replaced; a subclass that calls ``super().forward`` reaches it too."""
    meeting = _MEETING.setdefault(base, _meeting(base))
    if cls is base:
        return meeting
    return _MEETING.setdefault(cls, type(cls.__name__, (cls, meeting), {"__module__": cls.__module__}))


@dataclass(eq=False)
class _Skeleton:
    """A structure-only copy of the module, and where the tensors of a call go in it."""

    module: nn.Module
    slots: list[tuple[dict[str, Any], str, str, bool]]  # (dict of the module, name in it, key, whether a call may write)
    bindings: dict[str, _Binding]  # by weight key
    pristine: list[tuple[nn.Module, dict[str, Any], list[tuple[dict[str, Any], dict[str, Any]]]]] = field(
        default_factory=list
    )
    marks: list[tuple[Any, ...]] = field(default_factory=list)

    def remember(self) -> None:
        """Records every module's attributes, so that whatever a forward writes can be found and put back."""
        for m in self.module.modules():
            inner = [d for d in m.__dict__.values() if type(d) is dict or type(d) is set]
            self.pristine.append((m, dict(m.__dict__), [(d, copy.copy(d)) for d in inner]))  # type: ignore[misc]
        self.marks = [self._mark(m) for m, _, _ in self.pristine]

    @staticmethod
    def _mark(m: nn.Module) -> tuple[Any, ...]:
        d = m.__dict__
        return (tuple(map(id, d.values())), tuple(map(id, m._buffers.values())), tuple(map(id, m._modules.values())))

    def restore(self) -> None:
        """Puts back the attributes of every module that no longer looks as it was recorded."""
        for (m, attributes, inner), mark in zip(self.pristine, self.marks, strict=True):
            if self._mark(m) != mark:
                m.__dict__.clear()
                m.__dict__.update(attributes)
                for d, content in inner:
                    d.clear()
                    d.update(content)


class Model:
    """A module's forward as a pure function of a tree of tensors; made by ``functionalize``.

    Static and hashable by identity. ``model(params, *args, **kwargs)`` returns what the module's forward returns in eval mode.

    Attributes:
        ties: Alias keys of tied tensors, each with the one key under which ``params`` holds the tensor. A tree may carry the
            alias too, which unties it.
        shapes: Shape of every leaf.
    """

    def __init__(self, module: nn.Module) -> None:
        names = dict(module.named_parameters(remove_duplicate=False))
        buffers = dict(module.named_buffers(remove_duplicate=False))
        first: dict[int, str] = {}
        self.ties: dict[str, str] = {}
        for name, t in (*names.items(), *buffers.items()):
            if first.setdefault(id(t), name) != name:
                self.ties[name] = first[id(t)]
        self.shapes = {n: t.shape for n, t in (*names.items(), *buffers.items()) if n not in self.ties}
        self.dtypes = {n: t.dtype for n, t in (*names.items(), *buffers.items()) if n not in self.ties}
        self.buffers = frozenset(n for n in buffers if n not in self.ties)
        self._keys = frozenset(self.shapes)
        self._template = _copy(module)
        self._template.eval()
        self._pools: dict[frozenset[str], list[_Skeleton]] = {}
        self._traced: dict[frozenset[str], _Skeleton] = {}
        self._making = threading.Lock()
        self._sites: dict[str, Site] = {}
        self.name = type(module).__name__
        self.config = getattr(self._template, "config", None)
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
            ValueError: If a leaf has another shape than the module's.
        """
        return self._run(_itself, params, args, kwargs)[0]

    def call(self, method: str, params: Params, /, *args: Any, **kwargs: Any) -> Any:
        """Calls another method of the module, such as ``"generate"``."""
        if not callable(getattr(self._template, method, None)):
            known = [n for n in dir(type(self._template)) if not n.startswith("_")]
            raise KeyError(errors.say(self.name, "the module must have the method", repr(method), errors.nearest(method, known)))
        return self._run(lambda m: getattr(m, method), params, args, kwargs)[0]

    def embed(self, params: Params, ids: Tensor) -> Tensor:
        """Looks up ids in the module's input embedding (``get_input_embeddings``, as transformers' models have it)."""
        if not hasattr(self._template, "get_input_embeddings"):
            raise TypeError(errors.say(self.name, "the module must have get_input_embeddings", None, "use a transformers model"))
        return self._run(lambda m: m.get_input_embeddings(), params, (ids,), {})[0]

    def stateful(self, params: Params, /, *args: Any, **kwargs: Any) -> tuple[Any, Params]:
        """Returns the output and new params in which the buffers that the forward wrote have their new values."""
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
        """Returns the static facts of a parameter, given its key in ``params``."""
        if not self._sites:
            self._sites = {s.weight: s for s in _sites(self)}
        return self._sites[key]

    # -- the call --------------------------------------------------------------------------------------------------------

    def check(self, params: Params) -> None:
        """Raises ``KeyError`` if leaves are missing or unknown."""
        keys = params.keys()
        if keys == self._keys:
            return
        missing = sorted(self._keys - keys)
        unknown = sorted(k for k in keys - self._keys if k not in self.ties)
        if unknown:
            hint = errors.nearest(unknown[0], missing or self._keys)
            raise errors.NameMissingError(errors.say(self.name, "params must hold the model's leaves only", errors.listed(unknown), hint))
        if missing:
            raise errors.NameMissingError(
                errors.say(self.name, "params must hold every leaf", f"none for {errors.listed(missing)}", "take params from functionalize")
            )

    def _run(
        self, target: Callable[[nn.Module], Any], params: Params, args: Any, kwargs: Any, *, stateful: bool = False
    ) -> tuple[Any, Params]:
        if not isinstance(params, dict):
            raise TypeError(errors.say(self.name, "params must be a dict of leaves", type(params).__name__, "take params from functionalize"))
        self.check(params)
        expressions = frozenset(k for k, v in params.items() if not isinstance(v, Tensor))
        if torch.compiler.is_compiling():
            # the graph does not run this object, but its guards read it: one that no eager call ever touches
            return self._fill(self._trace_skeleton(expressions), target, params, args, kwargs, stateful)
        pool = self._pools.setdefault(expressions, [])
        try:
            skeleton = pool.pop()
        except IndexError:
            skeleton = self._make(expressions)
        try:
            return self._fill(skeleton, target, params, args, kwargs, stateful)
        finally:
            skeleton.restore()
            pool.append(skeleton)

    def _fill(
        self, s: _Skeleton, target: Callable[[nn.Module], Any], params: Params, args: Any, kwargs: Any, stateful: bool
    ) -> tuple[Any, Params]:
        taken = [d.get(name) for d, name, _, _ in s.slots]
        read = self._read(s, params)
        try:
            for d, name, key, written in s.slots:
                value = read.get(key)
                if value is None:
                    value = params[key] if key in params else params[self.ties[key]]
                if not isinstance(value, Tensor):
                    value = dense(value)
                elif value.shape != self.shapes[self.ties.get(key, key)]:
                    raise ValueError(
                        errors.say(f"params[{key!r}]", f"shape must be {tuple(self.shapes[self.ties.get(key, key)])}", tuple(value.shape))
                    )
                d[name] = value.clone() if written else value
            for key, b in s.bindings.items():
                bias = None if b.site.bias is None else dense(params[b.site.bias])
                b.bind(params[key], bias)
            out = target(s.module)(*args, **kwargs)
            if not stateful:
                return out, params
            now = {key: d[name] for d, name, key, written in s.slots if written and key in self.buffers}
            return out, {**params, **now}
        finally:
            for (d, name, _, _), old in zip(s.slots, taken, strict=True):
                d[name] = old
            for b in s.bindings.values():
                b.bind(None, None)

    def _read(self, s: _Skeleton, params: Params) -> Params:
        """Makes dense, weight and bias together, the adapted weights that a module reads by itself."""
        read: Params = {}
        for key, value in params.items():
            if isinstance(value, Adapted) and key not in s.bindings and value.site.bias is not None:
                bias = dense(params[value.site.bias])
                read[key], read[value.site.bias] = dense_pair(value, bias)
        return read

    def _trace_skeleton(self, expressions: frozenset[str]) -> _Skeleton:
        if expressions not in self._traced:
            self._traced[expressions] = self._make(expressions)
        return self._traced[expressions]

    @torch.compiler.disable
    def prepare(self, keys: frozenset[str]) -> None:
        """Makes the skeletons for params whose expressions are at these keys, ahead of a trace."""
        if keys not in self._traced:
            self._traced[keys] = self._make(keys)

    def _make(self, expressions: frozenset[str]) -> _Skeleton:
        with self._making:  # copying reads the template, which a first copy in another thread may still be settling
            return self._make_now(expressions)

    def _make_now(self, expressions: frozenset[str]) -> _Skeleton:
        module = copy.deepcopy(self._template)
        modules = dict(module.named_modules(remove_duplicate=False))
        bindings: dict[str, _Binding] = {}
        for key in sorted(expressions):
            site = self.site(key)
            owner, name = _split(key)
            if site.met:
                bindings[key] = _place(modules[owner], name, site)
        slots: list[tuple[dict[str, Any], str, str, bool]] = []
        seen: set[tuple[int, str]] = set()
        for prefix, m in modules.items():
            writes = isinstance(m, nn.Embedding) and m.max_norm is not None
            for d, kept in ((m._parameters, writes), (m._buffers, True)):
                for name, t in d.items():
                    if t is not None and (id(m), name) not in seen:
                        seen.add((id(m), name))
                        slots.append((d, name, f"{prefix}.{name}" if prefix else name, kept))
        skeleton = _Skeleton(module, slots, bindings)
        skeleton.remember()
        return skeleton


def _itself(module: nn.Module) -> nn.Module:
    return module


def _split(key: str) -> tuple[str, str]:
    owner, _, name = key.rpartition(".")
    return owner, name


def _place(module: nn.Module, name: str, site: Site) -> _Binding:
    """Turns a layer of a skeleton into a site: no parameters, stand-ins in their place, ``forward`` meets."""
    binding = _Binding(site)
    found = layers.kind_of(module)
    assert found is not None
    module.__class__ = _site_class(type(module), found[1])
    module.__dict__["_binding"] = binding
    del module._parameters[name]
    module.__dict__[name] = _StandIn(binding, 0)
    if site.bias is not None:
        del module._parameters["bias"]
        module.__dict__["bias"] = _StandIn(binding, 1)
    return binding


def _copy(module: nn.Module) -> nn.Module:
    """Copies a module's structure with every parameter and buffer on the meta device; ties stay ties."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    for m in module.modules():  # a tensor kept as a plain attribute is constant; it is shared, not copied
        for t in m.__dict__.values():
            if isinstance(t, Tensor) and id(t) not in memo:
                memo[id(t)] = t
    try:
        return copy.deepcopy(module, memo)
    except Exception as e:
        raise TypeError(
            errors.say(f"functionalize({type(module).__name__})", "the module must be copyable", f"{type(e).__name__}: {e}")
        ) from e


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
        yield Site(path, key, bias, layers.parameter_kind(module, name), model.shapes[held], model.dtypes[held], index, met, salt)


def functionalize(module: nn.Module) -> tuple[Model, Params]:
    """Turns a module into a pure function and a flat tree of its tensors.

    Args:
        module: Any ``nn.Module``. It is never written, and its storage is shared, not copied. The function runs in eval mode.

    Returns:
        ``(model, params)``: ``model(params, *args, **kwargs)`` returns exactly what the module's forward returns;
        ``params`` holds parameters and buffers by dotted name, detached, tied ones once (``model.ties`` maps aliases).

    Raises:
        TypeError: If ``module`` is not an ``nn.Module`` or cannot be copied.
        ValueError: If a parameter is on the meta device.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(errors.say("functionalize", "an nn.Module is required", type(module).__name__))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, t in tensors.items():
        if t.is_meta:
            raise ValueError(errors.say(f"functionalize at {name!r}", "every tensor must hold data", "a meta tensor", "load the weights first"))
    register_caches()
    return Model(module), {name: t.detach() for name, t in tensors.items()}


def register_caches() -> None:
    """Registers transformers' cache classes with torch's pytree, so that a default model's output maps under ``vmap``."""
    import sys

    if "transformers" not in sys.modules:
        return
    _CacheNode.register()


class _CacheNode:
    """How transformers' ``DynamicCache`` and ``EncoderDecoderCache`` are trees: key and value tensors per layer."""

    done: ClassVar[bool] = False

    @classmethod
    def register(cls) -> None:
        if cls.done:
            return
        import torch.utils._pytree as pytree
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        for node in (DynamicCache, EncoderDecoderCache):
            if node not in pytree.SUPPORTED_NODES:
                pytree.register_pytree_node(node, cls.flatten, cls.unflatten)
        cls.done = True

    @staticmethod
    def flatten(cache: Any) -> tuple[list[Tensor], Any]:
        leaves: list[Tensor] = []
        shell = copy.copy(cache)
        if hasattr(cache, "self_attention_cache"):
            parts = [_CacheNode.flatten(c) for c in (cache.self_attention_cache, cache.cross_attention_cache)]
            return [t for ts, _ in parts for t in ts], (shell, [(len(ts), ctx) for ts, ctx in parts])
        shell.layers = [copy.copy(layer) for layer in cache.layers]
        names: list[tuple[str, ...]] = []
        for layer in shell.layers:
            held = tuple(n for n, v in vars(layer).items() if isinstance(v, Tensor))
            placed = vars(layer).get("_held", ())
            if any(vars(layer).get(n) is not None and n not in held for n in placed):
                held = placed  # a transform put its own objects (dims, specs) where the tensors were
            leaves += [getattr(layer, n) for n in held]
            for n in held:
                setattr(layer, n, None)
            names.append(held)
        return leaves, (shell, names)

    @staticmethod
    def unflatten(children: Any, context: Any) -> Any:
        shell, names = context
        children, cache = list(children), copy.copy(shell)
        if hasattr(shell, "self_attention_cache"):
            made = []
            for count, ctx in names:
                made.append(_CacheNode.unflatten(children[:count], ctx))
                children = children[count:]
            cache.self_attention_cache, cache.cross_attention_cache = made
            return cache
        cache.layers = [copy.copy(layer) for layer in shell.layers]
        for layer, held in zip(cache.layers, names, strict=True):
            layer._held = held
            for n in held:
                setattr(layer, n, children.pop(0))
        return cache


def as_expression(params: Params) -> dict[str, Expression]:
    """Returns the leaves that are expressions rather than tensors."""
    return {k: v for k, v in params.items() if isinstance(v, Adapted | Quantized)}
