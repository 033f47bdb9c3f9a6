"""Weight expressions: what a leaf of ``params`` may be during a call, and what meets an input.

An expression is a ``Tensor``, a ``Quantized`` (plain tensors and a static format) or an ``Adapted`` (an expression, a
method, its leaves). It has two meanings: ``dense``, the stored weight it stands for, and ``meet``, the product with an
input, which never makes the dense weight where the method can avoid it. Since ``Adapted`` holds an expression, methods
nest, on quantized bases too. Methods see one layer as a ``Base``. Of a population the weight is ``fold.Folded``, which
meets an input by the same ``meet``. Imports storage, layers, context, tree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from funcpeft import rng
from funcpeft.context import EVAL, Context
from funcpeft.layers import Kind
from funcpeft.storage import Quantized, product
from funcpeft.tree import Leaves, register

if TYPE_CHECKING:
    from funcpeft.method import Method


@dataclass(frozen=True)
class Site:
    """One targeted parameter. Static: known from the module alone.

    Attributes:
        path: The module's dotted name, or module.parameter where the parameter is not ``weight``.
        weight: Its key in ``params``.
        bias: The key of the bias that belongs to it, or ``None``.
        kind: How its stored weight is a matrix and meets an input.
        shape: Shape of the stored weight.
        dtype: dtype of the stored weight.
        index: Position among the sites of its method, in module order.
        met: Whether inputs meet it through its layer's ``forward``; otherwise its module reads the dense weight.
        salt: 31-bit hash of the path, which tells its draws from other sites'.
        reader: Dotted name of the module whose forward reads it: its owner, or what reads a child's weight by itself.
    """

    path: str
    weight: str
    bias: str | None
    kind: Kind
    shape: torch.Size
    dtype: torch.dtype
    index: int
    met: bool
    salt: int
    reader: str


def salt_of(path: str) -> int:
    """Returns the salt of the draws at a site: 31 bits of its path."""
    return rng.fold_in(0, path) & 0x7FFFFFFF


@dataclass(frozen=True, eq=False)
class Adapted:
    """A weight with a method on it: ``base`` is any expression, ``leaves`` the method's tensors at this site."""

    base: Any
    site: Site
    method: Method
    leaves: Leaves
    context: Context = EVAL

    @property
    def shape(self) -> torch.Size:
        """Shape of the stored weight."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored weight."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """Device of the base weight."""
        return self.base.device


register(
    Adapted,
    lambda a: ((a.base, a.leaves, a.context), (a.site, a.method)),
    lambda static, children: Adapted(children[0], static[0], static[1], children[1], children[2]),
    lambda a: ("base", "leaves", "context"),
)

Expression = Tensor | Quantized | Adapted


def wide(t: Tensor) -> Tensor:
    """Returns the tensor in float32 or wider, the precision in which weights are combined."""
    return t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t


class Base:
    """What a site computes without the method that looks at it: the view methods are written against.

    ``base(x)`` is the layer's output, bias included; ``base.weight`` is the matrix ``(*lead, out, in)``, made dense on first
    use; ``base.bias`` is ``(out,)`` or ``None``. Both are in the dtype in which the method computes, float32 or wider, and so
    are the leaves that ``merge`` gets. ``base.map(x, M)`` meets x with another matrix of the same ``in`` at the layer's
    geometry; ``over_in`` and ``over_out`` apply a function of the last axis to the feature axis of inputs and outputs.
    """

    __slots__ = ("_expr", "_leaves", "_occurrence", "_pair", "_precision", "_raw_bias", "site")

    def __init__(
        self,
        site: Site,
        expr: Any,
        bias: Tensor | None = None,
        occurrence: int = 0,
        precision: torch.dtype | None = None,
        leaves: Leaves | None = None,
    ) -> None:
        self.site, self._expr, self._raw_bias, self._occurrence = site, expr, bias, occurrence
        self._precision, self._leaves = precision, leaves
        self._pair: tuple[Tensor, Tensor | None] | None = None

    @property
    def precision(self) -> torch.dtype:
        """The dtype in which the method computes: the widest of the weight's, the leaves' and float32."""
        if self._precision is None:
            self._precision = common_dtype(self._expr.dtype, self._leaves or {})
        return self._precision

    path = property(lambda self: self.site.path, doc="Path of the site.")
    index = property(lambda self: self.site.index, doc="Position among the sites of the method.")
    kind = property(lambda self: self.site.kind, doc="The layer kind.")
    takes_ids = property(lambda self: self.site.kind.takes_ids, doc="Whether inputs are ids (an embedding).")
    met = property(lambda self: self.site.met, doc="Whether inputs meet this site; else only ``merge`` is used.")
    dtype = property(lambda self: self._expr.dtype, doc="dtype of the stored weight and of the layer's output.")
    device = property(lambda self: self._expr.device, doc="Device of the stored weight.")

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix, ``(*lead, out, in)``, found without making it."""
        return self.kind.matrix(torch.empty(self.site.shape, device="meta")).shape

    @property
    def stored(self) -> tuple[Tensor, Tensor | None] | None:
        """The stored weight and bias, if they are plain tensors."""
        return (self._expr, self._raw_bias) if isinstance(self._expr, Tensor) else None

    @property
    def quantized(self) -> Quantized | None:
        """The stored form of the innermost weight, whose ``format.grid`` has group scales and zeros; ``None`` if dense."""
        expr = self._expr
        while isinstance(expr, Adapted):
            expr = expr.base
        return expr if isinstance(expr, Quantized) else None

    @property
    def channels(self) -> int:
        """Number of input features; smaller than ``in`` where a kernel covers several positions."""
        return self.kind.channels(self.site.shape)

    def _made(self) -> tuple[Tensor, Tensor | None]:
        if self._pair is None:
            weight, bias = effective(self._expr, self.site, self._raw_bias)
            self._pair = weight.to(self.precision), None if bias is None else bias.to(self.precision)
        return self._pair

    @property
    def weight(self) -> Tensor:
        """The matrix ``(*lead, out, in)``."""
        return self._made()[0]

    @property
    def bias(self) -> Tensor | None:
        """The bias ``(out,)``, or ``None``."""
        if isinstance(self._expr, Adapted) or self._pair is not None:
            return self._made()[1]
        return None if self._raw_bias is None else self._raw_bias.to(self.precision)

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the layer's output for ``x``, cast to the weight's dtype first unless it holds ids."""
        if not self.takes_ids and x.dtype != self.dtype:
            x = x.to(self.dtype)
        return meet(self._expr, self.site, self._raw_bias, x, self._occurrence)

    def map(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Meets ``x`` with a matrix ``(rows, in)`` at the layer's geometry, in the matrix's dtype, without bias."""
        return self.kind.map(x if self.takes_ids else x.to(matrix.dtype), matrix, self.site.shape)

    def adjoint(self, y: Tensor) -> Tensor:
        """Meets rows ``y (..., out)`` with the transposed weight, ``y @ weight``, which a stored weight is not made dense for.

        For layer kinds with ``has_adjoint``. It is the derivative of the layer by its input, so whatever inputs can meet will
        do; where a method sits in between, that is its merged weight, in the precision in which they are combined.
        """
        if isinstance(self._expr, Adapted):
            return y @ self.weight.to(y.dtype)
        if isinstance(self._expr, Tensor):
            return self.kind.adjoint(y, self._expr.to(y.dtype))
        x = torch.zeros(*y.shape[:-1], self.shape[-1], dtype=self.dtype, device=y.device)
        back: Any = torch.func.vjp(lambda x: meet(self._expr, self.site, None, x, self._occurrence), x)[1]
        return back(y.to(self.dtype))[0].to(y.dtype)

    def over_in(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies ``f`` to inputs with the feature axis moved last."""
        axis = self.kind.feature_axis()
        return f(x) if axis == -1 else f(x.movedim(axis, -1)).movedim(-1, axis)

    def over_out(self, y: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies ``f`` to outputs with the feature axis moved last."""
        return self.over_in(y, f)

    def features_last(self, y: Tensor) -> Tensor:
        """Returns inputs or outputs with the feature axis moved last."""
        return y.movedim(self.kind.feature_axis(), -1)

    def columns(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Returns what ``map`` multiplies a matrix's columns by, at every position: ``(..., in)``, or ids.

        Those are the features of a linear layer, the patches that a kernel sees, and an embedding's ids.
        """
        if self.takes_ids:
            return x
        x = x.to(matrix.dtype)
        if self.kind.name != "conv":
            return x
        return self.features_last(self.map(x, torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)))

    def over_columns(self, scale: Tensor) -> Tensor:
        """Spreads one number per input feature over the matrix's columns: ``(1 or out, in)``."""
        return self.kind.over_columns(scale, self.site.shape)

    def replace(self, *, weight: Tensor | None = None, bias: Tensor | None = None) -> Base:
        """Returns a view with another matrix and or bias; what ``merge`` gives back."""
        made = Base(self.site, self._expr, self._raw_bias, precision=self.precision)
        made._pair = (self.weight if weight is None else weight, self.bias if bias is None else bias)
        return made

    def unmade(self) -> Base:
        """Returns the view of the layer with nothing made dense yet, for those who keep it."""
        return Base(self.site, self._expr, self._raw_bias, self._occurrence, self.precision)

    def meet(self, x: Tensor) -> Tensor:
        """Meets ``x``, cast as a call casts it, with this view's dense weight and bias: how a method applies what it merged."""
        if not self.takes_ids and x.dtype != self.dtype:
            x = x.to(self.dtype)
        stored = self.kind.stored(self.weight, self.site.shape).to(self.dtype)
        bias = self.bias
        return self.kind.product(x, stored, None if bias is None else bias.to(self.dtype))


def effective(expr: Any, site: Site, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns the matrix and the bias that an expression stands for, in float32 or wider."""
    if isinstance(expr, Adapted):
        precision = common_dtype(expr.dtype, expr.leaves)
        merged = expr.method.merge(cast_leaves(expr.leaves, precision), Base(site, expr.base, bias, precision=precision))
        return merged.weight, merged.bias
    return wide(site.kind.matrix(dense(expr))), None if bias is None else wide(bias)


def common_dtype(dtype: torch.dtype, leaves: Leaves) -> torch.dtype:
    """Returns the dtype in which a weight and its leaves are combined: the widest of them, at least float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    for t in leaves.values():
        if t.is_floating_point():
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def cast_leaves(leaves: Leaves, dtype: torch.dtype) -> Leaves:
    """Returns the leaves with the floating ones in one dtype."""
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in leaves.items()}


def dense(expr: Any) -> Tensor:
    """Returns the stored weight an expression stands for, in its dtype."""
    if isinstance(expr, Tensor):
        return expr
    if isinstance(expr, Quantized):
        return expr.format.dequant(expr)
    if not isinstance(expr, Adapted):
        raise TypeError(f"dense: a Tensor, a Quantized or an Adapted is required, got {type(expr).__name__}.")
    return dense_pair(expr, None)[0]


def dense_pair(expr: Any, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns the stored weight and bias that an expression and a bias stand for, in their dtypes."""
    if not isinstance(expr, Adapted):
        return dense(expr), bias
    matrix, new_bias = effective(expr, expr.site, bias)
    stored = expr.site.kind.stored(matrix, expr.shape).to(expr.dtype)
    return stored, None if new_bias is None else new_bias.to(expr.dtype)


def output_dtype(expr: Any, site: Site, x: Tensor) -> torch.dtype:
    """Returns the dtype of a layer's output: the stored weight's, or of a float input to a quantized one the input's."""
    while isinstance(expr, Adapted):
        expr = expr.base
    return x.dtype if isinstance(expr, Quantized) and not site.kind.takes_ids and x.is_floating_point() else expr.dtype


def meet(expr: Any, site: Site, bias: Tensor | None, x: Tensor, occurrence: int = 0) -> Tensor:
    """Computes a layer's output for an input, the weight being an expression.

    Args:
        expr: The weight.
        site: Its static facts.
        bias: The layer's dense bias, or ``None``.
        x: The layer's input.
        occurrence: How many times this call has met the site before; it tells their draws apart.
    """
    if isinstance(expr, Adapted):
        context = expr.context.at(site.salt, occurrence)
        y = expr.method.apply(expr.leaves, Base(expr.site, expr.base, bias, occurrence, leaves=expr.leaves), x, context)
        return y.to(output_dtype(expr, site, x))
    if isinstance(expr, Quantized):
        return product(site.kind, x, expr, bias)
    if isinstance(expr, Tensor):
        return site.kind.product(x, expr, bias)
    return expr.meet(site, bias, x, occurrence)
