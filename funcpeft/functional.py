"""A module as a pure function of ``(params, inputs)``; the only file that calls a module.

``functionalize`` copies a module's structure onto the meta device (a *skeleton*: no storage is copied, the module is never
written) and returns it as a static callable with a flat tree of the module's tensors. During a call the skeleton's slots
hold the caller's tensors; after it everything that the call wrote is put back, so nothing outlives a call. At a site whose
weight is an expression the skeleton has no parameter but a stand-in: the layer's ``forward`` meets the expression, and any
other reader sees shape, dtype and device, or the dense value, computed once per call.

Each call takes a skeleton from a pool, so threads never share one, nor do nested calls; traced calls have one of their own.
Imports skeleton, attention, caches, weights, layers, rng, errors.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from funcpeft import errors, layers
from funcpeft.attention import choose_attention
from funcpeft.blocks import Block, block_paths
from funcpeft.caches import register_caches
from funcpeft.fold import Folded, folded_like
from funcpeft.skeleton import Skeleton, split, structure, tensors_of
from funcpeft.weights import Adapted, Quantized, Site, dense, dense_pair, salt_of

Params = dict[str, Any]

_EXPRESSIONS = (Adapted, Quantized, Folded)

#: What a skeleton is made for: the keys whose leaves are expressions, and those of them that make a module a unit.
Form = tuple[frozenset[str], frozenset[str]]


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
        remat: Paths of the modules whose intermediates are recomputed in the backward pass.
    """

    def __init__(self, module: nn.Module, remat: bool | str | Sequence[str] = False) -> None:
        self.ties, self._shared = _ties(module)
        tensors = {n: t for n, t in tensors_of(module).items() if n not in self.ties and n not in self._shared}
        buffers = dict(module.named_buffers(remove_duplicate=False))
        self.shapes = {n: t.shape for n, t in tensors.items()}
        self.dtypes = {n: t.dtype for n, t in tensors.items()}
        self.buffers = frozenset(n for n in tensors if n in buffers)
        self._keys = frozenset(self.shapes)
        self._template = structure(module)
        self._template.eval()
        choose_attention(self._template)
        self._pools: dict[Form, list[Skeleton]] = {}
        self._traced: dict[Form, Skeleton] = {}
        self._making = threading.Lock()
        self.name = type(module).__name__
        self.config = getattr(self._template, "config", None)
        self._sites = {s.weight: s for s in _sites(self)}
        self.remat = block_paths(self._template, remat)
        self.mirrors: dict[Any, Any] = {}  # smaller models of its kind that run beside it (``mirrors``), made once
        self._caches = "use_cache" in inspect.signature(self._template.forward).parameters
        self._met = frozenset(k for k, site in self._sites.items() if site.met)
        self._weight_of = {s.bias: s.weight for s in self._sites.values() if s.met and s.bias is not None}
        self.prepare(frozenset())

    def __repr__(self) -> str:
        count = sum(s.numel() for k, s in self.shapes.items() if k not in self.buffers)
        return f"Model({self.name}, {count:,} parameters in {len(self.shapes)} leaves)"

    def __deepcopy__(self, memo: Any) -> Model:
        return self

    def replace(self, *, remat: bool | str | Sequence[str]) -> Model:
        """Returns a model of the same structure that recomputes other modules in the backward pass; as ``functionalize``."""
        made = copy.copy(self)
        made.remat, made._pools, made._making = block_paths(self._template, remat), {}, threading.Lock()
        return made

    def __call__(self, params: Params, /, *args: Any, **kwargs: Any) -> Any:
        """Returns what the module's forward returns for these tensors.

        Raises:
            KeyError: If a leaf is missing or unknown; the message names it and the nearest known one.
            TypeError: If ``params`` is not a dict, or a leaf is neither a tensor nor an expression.
            ValueError: If a leaf has another shape than the module's.
        """
        if self.remat and torch.is_grad_enabled() and self._caches and "use_cache" not in kwargs:
            kwargs = {**kwargs, "use_cache": False}  # a block that fills a cache cannot run a second time
        return self.run(_itself, params, args, kwargs)[0]

    def call(self, method: str, params: Params, /, *args: Any, **kwargs: Any) -> Any:
        """Calls another method of the module, such as ``"generate"``.

        Raises:
            KeyError: If the module has no such method.
        """
        if not callable(getattr(self._template, method, None)):
            known = [n for n in dir(type(self._template)) if not n.startswith("_")]
            hint = errors.nearest(method, known)
            raise errors.NameMissingError(errors.say(self.name, "the module must have the method", repr(method), hint))
        return self.run(lambda m: getattr(m, method), params, args, kwargs)[0]

    def embed(self, params: Params, ids: Tensor) -> Tensor:
        """Looks up ids in the module's input embedding (``get_input_embeddings``, as transformers' models have it)."""
        if not hasattr(self._template, "get_input_embeddings"):
            raise TypeError(
                errors.say(self.name, "the module must have get_input_embeddings", None, "use a transformers model")
            )
        return self.run(lambda m: m.get_input_embeddings(), params, (ids,), {})[0]

    def stateful(self, params: Params, /, *args: Any, **kwargs: Any) -> tuple[Any, Params]:
        """Returns the output, and new params in which what the forward wrote has its new value.

        That is buffers, and the weight that an ``Embedding`` with ``max_norm`` rescales. All other leaves are the argument's.
        """
        return self.run(_itself, params, args, kwargs, stateful=True)

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

    def prepare(self, keys: frozenset[str], folded: frozenset[str] = frozenset(), read: frozenset[str] = frozenset()) -> None:
        """Makes what a trace needs for params whose expressions are at these keys; ``net.init`` does so.

        ``folded`` are those of the keys that a population adapts, ``read`` those of them that are read beside their layer.
        """
        form = keys, self._units(keys, folded, read)
        if form not in self._traced:
            self._traced[form] = self._make(form, traced=True)

    def _units(self, keys: frozenset[str], folded: Iterable[str], read: frozenset[str]) -> frozenset[str]:
        """Returns the keys of folded weights that no layer meets, or not only, so that what reads them runs whole."""
        met, weight_of = self._met, self._weight_of
        return frozenset([k for k in folded if (k in read if k in met else weight_of.get(k) not in keys)])

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

    def run(
        self, target: Callable[[Any], Any], params: Params, args: Any, kwargs: Any, *, stateful: bool = False
    ) -> tuple[Any, Params]:
        """Calls ``target(module)(*args, **kwargs)`` with the tensors in the module; for what ``call`` cannot name.

        Returns:
            The output, and params as ``stateful`` returns them if that is asked for.
        """
        if not isinstance(params, dict):
            found = type(params).__name__
            raise TypeError(errors.say(self.name, "params must be a dict of leaves", found, "take params from functionalize"))
        self.check(params)
        form = self._form(params)
        if torch.compiler.is_dynamo_compiling():
            # the graph does not run this object, but its guards read it: one that no eager call ever touches
            if form not in self._traced:
                rule = "what a trace needs must be made before it"
                raise RuntimeError(errors.say(self.name, rule, None, "call net.init or model.prepare for these params outside"))
            return self._run_traced(self._traced[form], target, params, args, kwargs, stateful)
        pool = self._pools.setdefault(form, [])
        try:
            skeleton = pool.pop()
        except IndexError:
            skeleton = self._make(form)
        try:
            values = self._bind(skeleton, params)
            out = target(skeleton.module)(*args, **kwargs)
            return out, self._written(skeleton, params, values) if stateful else params
        finally:
            skeleton.restore()
            pool.append(skeleton)

    def _form(self, params: Params) -> Form:
        """Returns what a skeleton must be made for to take these params."""
        keys, folded = [], []
        for key, leaf in params.items():
            if isinstance(leaf, Tensor):
                continue
            if not isinstance(leaf, _EXPRESSIONS):
                rule, found = "a leaf must be a tensor or a weight expression", type(leaf).__name__
                raise TypeError(errors.say(f"params[{key!r}]", rule, found, "take params from functionalize"))
            keys.append(key)
            if isinstance(leaf, Folded):
                folded.append(key)
        expressions = frozenset(keys)
        read = frozenset([k for k in folded if params[k].read])
        return expressions, self._units(expressions, folded, read) if folded else frozenset()

    def _run_traced(
        self, s: Skeleton, target: Callable[[Any], Any], params: Params, args: Any, kwargs: Any, stateful: bool
    ) -> tuple[Any, Params]:
        taken = s.taken()
        try:
            values = self._bind(s, params)
            out = target(s.module)(*args, **kwargs)
            return out, self._written(s, params, values) if stateful else params
        finally:
            s.restore_traced(taken)

    def _bind(self, s: Skeleton, params: Params) -> Params:
        """Puts a call's tensors and expressions into a skeleton, and returns the tensors by key of their slot."""
        values, copies = self._read(s, params), {}
        for key, b in s.bindings.items():
            b.bind(*self._weight_and_bias(params, b.site, params[key]))
        for unit in s.units:
            unit.bind(params)
        for key in s.keys:
            if key in values:
                continue
            source = key if key in params else self.ties.get(key, key)
            value: Any
            if source in params and isinstance(params[source], Folded):  # its unit puts it there, member by member
                values[key] = _hollow(params[source])
                continue
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

    def _weight_and_bias(self, params: Params, site: Site, weight: Any) -> tuple[Any, Any]:
        bias = None if site.bias is None else self._leaf(params, site.bias)
        if not isinstance(bias, Folded):
            return weight, None if bias is None else dense(bias)
        return weight if isinstance(weight, Folded) else folded_like(weight, bias), bias

    def _fitting(self, key: str, value: Tensor) -> Tensor:
        shape = self.shapes.get(self.ties.get(key, key), value.shape)
        if value.shape != shape:
            raise ValueError(errors.say(f"params[{key!r}]", f"shape must be {tuple(shape)}", tuple(value.shape)))
        return value

    def _leaf(self, params: Params, key: str) -> Any:
        return params[key] if key in params else params[self.ties[key]]

    def _read(self, s: Skeleton, params: Params) -> Params:
        """Makes dense, weight and bias together, the adapted weights that a module reads by itself."""
        read: Params = {}
        for key, value in params.items():
            if isinstance(value, Adapted) and key not in s.bindings and value.site.bias is not None:
                read[key], read[value.site.bias] = dense_pair(value, dense(self._leaf(params, value.site.bias)))
        return read

    def _written(self, s: Skeleton, params: Params, values: Params) -> Params:
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

    def _make(self, form: Form, *, traced: bool = False) -> Skeleton:
        expressions, units = form
        sites = [(*split(key), site) for key in sorted(expressions) if (site := self.site(key)).met]
        read = [self.site(key) for key in sorted(units)]
        with self._making:  # copying reads the template, which a first copy in another thread may still be settling
            lend = functools.partial(self._lend, form)
            return Skeleton(self._template, sites, self.ties, traced, read, () if traced else self.remat, lend)

    @contextmanager
    def _lend(self, form: Form, path: str) -> Iterator[Block]:
        """Lends a skeleton for one run of a block of it."""
        pool = self._pools.setdefault(form, [])
        try:
            skeleton = pool.pop()
        except IndexError:
            skeleton = self._make(form)
        yield skeleton.blocks[path]
        pool.append(skeleton)


def _hollow(weight: Any) -> Tensor:
    """Makes what has the dtype, device and shape of a weight, and no value."""
    return torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)


def _itself(module: nn.Module) -> nn.Module:
    return module


def _ties(module: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the aliases of tied tensors, and those that a module under two names makes; each with the first name."""
    modules = dict(module.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    slots: dict[tuple[int, str], str] = {}
    ties: dict[str, str] = {}
    shared: dict[str, str] = {}
    for key, t in tensors_of(module).items():
        owner, name = split(key)
        same = slots.setdefault((id(modules[owner]), name), key)
        if same != key:
            shared[key] = same
        elif first.setdefault(id(t), key) != key:
            ties[key] = first[id(t)]
    return ties, {alias: ties.get(key, key) for alias, key in shared.items()}


def _sites(model: Model) -> Iterator[Site]:
    """Yields the facts of every parameter of a model."""
    read: dict[str, str | None] = {}
    readers: dict[str, str] = {}
    modules = dict(model.root.named_modules(remove_duplicate=False))
    for prefix, m in modules.items():
        dot = f"{prefix}." if prefix else ""
        for name, bias, _ in layers.read_weights(m):
            read[dot + name] = None if bias is None else dot + bias
            readers |= {dot + n: prefix for n in (name, bias) if n is not None}
    keys = [k for k in model.shapes if k not in model.buffers]
    keys += [alias for alias, key in model.ties.items() if key not in model.buffers]
    for index, key in enumerate(keys):
        held = model.ties.get(key, key)
        owner, name = split(key)
        module = modules[owner]
        met = name == "weight" and layers.kind_of(module) is not None and key not in read
        bias = read.get(key)
        if met and getattr(module, "bias", None) is not None:
            bias = f"{owner}.bias" if owner else "bias"
        path = owner if name == "weight" and owner else key
        salt = salt_of(path)
        kind, reader = layers.parameter_kind(module, name), readers.get(key, owner)
        yield Site(path, key, bias, kind, model.shapes[held], model.dtypes[held], index, met, salt, reader)


def functionalize(
    module: nn.Module,
    *,
    remat: bool | str | Sequence[str] = False,
    replaced: Mapping[str, tuple[nn.Module, Params]] | None = None,
) -> tuple[Model, Params]:
    """Turns a module into a pure function and a flat tree of its tensors; ``interop.modules`` has the public form.

    Args:
        module: Any ``nn.Module``. It is never written, and its storage is shared, not copied. The function runs in eval mode.
        remat: Modules whose intermediates are recomputed in the backward pass.
        replaced: Layers that do not take part, by dotted name: the module on the meta device that stands for each, and
            the leaves of that module by name.

    Returns:
        ``(model, params)``.

    Raises:
        TypeError: If ``module`` is not an ``nn.Module`` or cannot be copied.
        ValueError: If a parameter or buffer holds no data (on the meta device, or of a lazy module).
    """
    if not isinstance(module, nn.Module):
        raise TypeError(errors.say("functionalize", "an nn.Module is required", type(module).__name__))
    replaced = replaced or {}
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = {name: t for name, t in tensors.items() if not any(name.startswith(f"{path}.") for path in replaced)}
    for name, t in tensors.items():
        lazy = nn.parameter.is_lazy(t)
        if lazy or t.is_meta:
            found, remedy = (
                ("a lazy tensor", "call the module once first") if lazy else ("a meta tensor", "load the weights first")
            )
            raise ValueError(errors.say(f"functionalize at {name!r}", "every tensor must hold data", found, remedy))
    register_caches()
    params: Params = {name: t.detach() for name, t in tensors.items()}
    for path, (_, leaves) in replaced.items():
        params |= {f"{path}.{name}": leaf for name, leaf in leaves.items()}
    if replaced:
        modules = dict(module.named_modules(remove_duplicate=False))
        module = structure(module, {id(modules[path]): plain for path, (plain, _) in replaced.items()})
    model = Model(module, remat)
    model.prepare(frozenset(name for name, leaf in params.items() if isinstance(leaf, Quantized)))
    return model, {name: params[name] for name in model.shapes}
