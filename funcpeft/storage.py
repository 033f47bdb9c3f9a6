"""Stored weights: the ``Quantized`` node, and the one product of an input with it.

A product decodes the weight and meets it. Where a gradient may flow to the input, ``torch.func`` and autograd would keep the
decoded weight until the backward pass; ``product`` keeps the codes instead and decodes a second time (Chen et al., Training
Deep Nets with Sublinear Memory Cost, 2016, arXiv 1604.06174, applied to one matrix). Nothing else in the package multiplies
by a quantized weight. Imports layers, tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from funcpeft.layers import Kind
from funcpeft.tree import register

#: The most tensors that a format may store per weight: the product is an autograd function of fixed arity, since torch
#: 2.13's tracer mixes up the arguments of one with ``*args``.
SLOTS = 6

#: Entries from which a weight is decoded again in backward rather than kept. Below it the autograd function costs more time
#: than decoding does, and what it saves is small; inside of a transform of torch.func, where it costs ten times as much, a
#: weight is worth it from a megabyte in float32.
RECOMPUTE_FROM = 2**14
RECOMPUTE_FROM_INSIDE = 2**18


class Format(Protocol):
    """What ``Quantized`` needs of a format; the contract is in ``quant/format.py``."""

    def dequant(self, quantized: Quantized) -> Tensor:
        """Decodes the weight."""
        ...


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight stored as codes and scales. A tree node: its children are the tensors, everything else is static.

    Attributes:
        data: Plain tensors, under the names that the format gives them.
        format: The format, a frozen dataclass: how to decode, with its options.
        shape: Shape of the weight that is stored.
        dtype: Floating dtype of the weight that is stored.
    """

    data: Mapping[str, Tensor]
    format: Any
    shape: torch.Size
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Device of the codes."""
        return next(iter(self.data.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in self.data.values())

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Quantized:
        """Moves every tensor to a device; a dtype is that of the decoded weight, and changes no code and no scale."""
        data = {n: t.to(device=device) for n, t in self.data.items()}
        return replace(self, data=data, dtype=dtype or self.dtype)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"Quantized({shape} {str(self.dtype).removeprefix('torch.')} as {self.format}, {self.nbytes:,} bytes)"


register(
    Quantized,
    lambda q: (tuple(q.data.values()), (tuple(q.data), q.format, tuple(q.shape), q.dtype)),
    lambda static, children: _made(static, children),
    lambda q: tuple(q.data),
)

torch.serialization.add_safe_globals([Quantized])

Static = tuple[tuple[str, ...], Any, tuple[int, ...], torch.dtype]


def _made(static: Static, children: Any) -> Quantized:
    names, fmt, shape, dtype = static
    return Quantized(dict(zip(names, children, strict=True)), fmt, torch.Size(shape), dtype)


def product(kind: Kind, x: Tensor, quantized: Quantized, bias: Tensor | None, *, recompute: bool | None = None) -> Tensor:
    """Meets an input with a stored weight.

    Args:
        kind: How the weight meets an input.
        x: The input, ``(..., in)`` for a linear layer. Outside of autocast a floating one of another dtype than the weight's
            is cast to it, and the output back, as bitsandbytes' layers do with their compute dtype.
        quantized: The weight.
        bias: ``(out,)``, or ``None``.
        recompute: Whether to decode again in backward where that can be done; by default for large weights.

    Note:
        Weights of fewer than ``RECOMPUTE_FROM`` entries (inside a transform ``RECOMPUTE_FROM_INSIDE``) are kept. Under
        ``torch.compile`` the weight is decoded in the graph, whose partitioner decides what is kept. Forward mode and autocast
        go through plain operations too.
    """
    if not kind.takes_ids and not torch.is_autocast_enabled(x.device.type):
        bias = None if bias is None else bias.to(quantized.dtype)
        if x.dtype != quantized.dtype:
            return product(kind, x.to(quantized.dtype), quantized, bias, recompute=recompute).to(x.dtype)
    tensors = tuple(quantized.data.values())
    if not (kind.has_adjoint and _recomputes(quantized, recompute) and _reverse_only(x)):
        return kind.product(x, quantized.format.dequant(quantized), bias)
    slots = (*tensors, *(None,) * (SLOTS - len(tensors)))
    static = (tuple(quantized.data), quantized.format, tuple(quantized.shape), quantized.dtype)
    return _Product.apply(x, bias, *slots, static, kind, False)


def _recomputes(quantized: Quantized, asked: bool | None) -> bool:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    least = RECOMPUTE_FROM_INSIDE if torch._C._are_functorch_transforms_active() else RECOMPUTE_FROM
    return quantized.shape.numel() >= least if asked is None else asked


def _reverse_only(x: Tensor) -> bool:
    """Whether reverse mode alone is at work, without autocast: what the autograd function is written for.

    torch 2.13 has no public way to ask for forward mode; if the private one goes, everything takes the plain way.
    """
    return getattr(forward_ad, "_current_level", 0) < 0 and not torch.is_autocast_enabled(x.device.type)


def _plain(x: Tensor, bias: Tensor | None, tensors: tuple[Tensor, ...], static: Static, kind: Kind, adjoint: bool) -> Tensor:
    weight = static[1].dequant(_made(static, tensors))
    return kind.adjoint(x, weight) if adjoint else kind.product(x, weight, bias)


class _Product(torch.autograd.Function):
    """The product or, with ``adjoint``, its transpose; the derivative of each is the other, so both decode anew."""

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor | None,
        c: Tensor | None,
        d: Tensor | None,
        e: Tensor | None,
        f: Tensor | None,
        static: Static,
        kind: Kind,
        adjoint: bool,
    ) -> Tensor:
        tensors = tuple(t for t in (a, b, c, d, e, f) if t is not None)
        return _plain(x, bias, tensors, static, kind, adjoint)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, bias, *slots, static, kind, adjoint = inputs
        ctx.static = (static, kind, adjoint)
        ctx.has_bias = bias is not None
        # x is needed for scales alone, with respect to which some level of a transform may differentiate
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2 : 2 + SLOTS]) else None, *slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        wanted = ctx.needs_input_grad
        x, *slots = ctx.saved_tensors
        dx = _transposed(grad, slots, *ctx.static) if wanted[0] else None
        db = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and wanted[1] else None
        return dx, db, *_of_slots(grad, x, slots, wanted[2 : 2 + SLOTS], *ctx.static), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, bias: Any, *rest: Any) -> Any:  # type: ignore[override]
        *slots, static, kind, adjoint = rest
        if all(d is None for d in in_dims[1 : 2 + SLOTS]):  # the weight is shared: one product for all, decoded once
            return _Product.apply(x.movedim(in_dims[0], 0), bias, *rest), 0
        used = [i for i, t in enumerate(slots) if t is not None]

        def one(x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
            return _plain(x, bias, tensors, static, kind, adjoint)

        dims = (in_dims[0], in_dims[1], *(in_dims[2 + i] for i in used))
        mapped = torch.func.vmap(one, in_dims=dims, randomness=info.randomness)
        return mapped(x, bias, *(slots[i] for i in used)), 0


def _transposed(grad: Tensor, slots: list[Any], static: Static, kind: Kind, adjoint: bool) -> Tensor:
    if torch.is_grad_enabled() and _reverse_only(grad):  # a second derivative may follow; torch.func.grad allows for one
        return _Product.apply(grad, None, *slots, static, kind, not adjoint)
    return _plain(grad, None, tuple(t for t in slots if t is not None), static, kind, not adjoint)


def _of_slots(
    grad: Tensor, x: Any, slots: list[Any], wanted: tuple[bool, ...], static: Static, kind: Kind, adjoint: bool
) -> tuple[Tensor | None, ...]:
    """Returns the gradient of every wanted slot, ``None`` for the others."""
    at = [i for i, w in enumerate(wanted) if w]
    if not at:
        return (None,) * SLOTS

    def of(*given: Tensor) -> Tensor:
        put = {**dict(enumerate(slots)), **dict(zip(at, given, strict=True))}
        return _plain(x, None, tuple(t for t in put.values() if t is not None), static, kind, adjoint)

    back: Any = torch.func.vjp(of, *(slots[i] for i in at))[1]
    found = dict(zip(at, back(grad), strict=True))
    return tuple(found.get(i) for i in range(SLOTS))
