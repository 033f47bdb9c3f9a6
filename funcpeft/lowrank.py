r"""The one product of a plain weight with low-rank updates of many members, and its derivative.

.. math:: y_n = x_n W^T + b + s_n (x_n A_n^T) B_n^T

Written out by hand because at small sizes the nodes of a tape cost more than the products: forward and backward are three
and five matrix products, the updates summed in place. Imports torch alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def fits(*tensors: Tensor) -> bool:
    """Whether reverse mode alone is at work, in one dtype, without autocast or a trace: what this is written for."""
    first = tensors[0]
    return (
        all(t.dtype == first.dtype for t in tensors)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and getattr(forward_ad, "_current_level", 0) < 0
        and not torch.is_autocast_enabled(first.device.type)
    )


def low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: Tensor) -> Tensor:
    """Computes the product for N members; twice differentiable.

    Args:
        x: ``(N, rows, in)``.
        weight: ``(out, in)``.
        bias: ``(out,)`` or ``None``.
        a: ``(N, r, in)``.
        b: ``(N, out, r)``.
        scaling: ``(N,)``, of any floating dtype.

    Returns:
        ``(N, rows, out)``.
    """
    if torch.is_grad_enabled():
        return _LowRank.apply(x, weight, bias, a, b, scaling)
    return _forward(x, weight, bias, a, b, scaling)[0]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, weight, bias)
    hidden = torch.bmm(a, x.mT).mT
    if scaling.stride(0):
        hidden, alpha = hidden * scaling.to(b.dtype).view(-1, 1, 1), 1.0
    else:  # all members share it
        alpha = float(scaling[0])
    y.baddbmm_(hidden, b.mT, alpha=alpha)
    return y, hidden


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, a: Tensor, b: Tensor, scaling: Tensor) -> Tensor:
        y, _ = _forward(x, weight, bias, a, b, scaling)
        ctx.save_for_backward(x, weight, a, b, scaling)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # the base class takes any number of gradients
        x, weight, a, b, scaling = ctx.saved_tensors
        wants = ctx.needs_input_grad
        s = scaling.to(b.dtype).view(-1, 1, 1)
        through = torch.bmm(grad, b)
        scaled = through * s
        dx = dw = db = da = dbm = ds = None
        if wants[0]:
            dx = _summed(grad @ weight, scaled, a)
        if wants[1]:
            dw = grad.flatten(0, 1).mT @ x.flatten(0, 1)
        if wants[2]:
            db = grad.sum((0, 1))
        if wants[3]:
            da = torch.bmm(scaled.mT, x)
        if wants[4] or wants[5]:
            hidden = torch.bmm(a, x.mT)
            dbm = torch.bmm(grad.mT, (hidden * s).mT) if wants[4] else None
            ds = (through * hidden.mT).sum((1, 2)).to(scaling.dtype) if wants[5] else None
        return dx, dw, db, da, dbm, ds


def _summed(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Adds a product to a tensor that nothing else holds."""
    return torch.baddbmm(y, left, right) if torch.is_grad_enabled() else y.baddbmm_(left, right)
