"""Stand-ins: what is in a skeleton where a site's weight was, and the classes by which layers meet an expression.

Imports fold, weights, layers, errors.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcpeft import errors, layers
from funcpeft.fold import Folded
from funcpeft.weights import Site, dense_pair, meet


class Binding:
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


class StandIn:
    """Stands where a site's weight or bias was: cheap facts at once, the dense value for every other use.

    It passes ``isinstance(weight, torch.Tensor)``. A tracer would take it for a tensor (and torch 2.13's swaps the operands of
    ``weight @ x`` for any object like it), so traced skeletons have properties instead, and the graph drops what is not used.
    """

    __slots__ = ("_binding", "_which")
    __class__ = property(lambda self: Tensor)  # type: ignore[assignment]  # what a proxy is for

    def __init__(self, binding: Binding, which: int) -> None:
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
    if kind is StandIn:
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
    setattr(StandIn, _name, _f)


@functools.cache
def _meeting(base: type) -> type:
    """Makes the class whose ``forward`` takes the place of a layer class's own in the method resolution order."""

    def forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.__dict__["_binding"].meet(*args, *kwargs.values())

    return type(base.__name__, (base,), {"forward": forward, "_apply": _kept, "__module__": base.__module__})


def _kept(module: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Takes the place of ``Module._apply`` for a layer that its model moves in the call, mostly to where it is already."""
    expr = module.__dict__["_binding"].expr
    wanted = fn(torch.empty(0, dtype=expr.dtype, device=expr.device))
    if (wanted.dtype, wanted.device) != (expr.dtype, expr.device):
        rule, remedy = "an adapted layer that its model casts in the call must have that dtype", "cast the base first"
        raise TypeError(errors.say(module.__dict__["_binding"].site.path, rule, f"{expr.dtype}, not {wanted.dtype}", remedy))
    return module


def _bias_of(module: Any) -> Any:
    binding = module.__dict__["_binding"]
    return None if binding.site.bias is None else binding.dense()[1]


#: What a site's weight and bias are where a tracer reads them.
_TRACED = {"weight": property(lambda self: self.__dict__["_binding"].dense()[0]), "bias": property(_bias_of)}
_CLASSES: dict[tuple[type, bool], type] = {}


def site_class(cls: type, base: type, traced: bool) -> type:
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


def mend_padding(module: nn.Module) -> None:
    """Gives an embedding with padding its kind's product, whose gradient is right under ``vmap`` too."""
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        found = layers.kind_of(module)
        if found is not None:
            module.__class__ = _padded_class(type(module), found[1])
            module.__dict__["_kind"] = found[0]
