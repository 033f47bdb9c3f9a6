r"""The one product of a plain weight with low-rank updates of many members, and its derivative.

.. math:: y_n = x_n W^T + b + s_n (x_n A_n^T) B_n^T

Written out by hand because at small sizes the nodes of a tape cost more than the products do: the product with the weight is
one for all rows, and the updates are summed in place into the members' parts of it. Imports torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

#: ``(members, rows of each)`` of every group, in the order of the rows; rows after them get no update.
Sizes = tuple[tuple[int, int], ...]


def fits(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether reverse mode alone is at work, in one dtype, without autocast or a trace: what this is written for."""
    return (
        x.dtype == weight.dtype == a.dtype == b.dtype
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and getattr(forward_ad, "_current_level", 0) < 0
        and not torch.is_autocast_enabled(x.device.type)
    )


def low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[tuple[Tensor, ...]], sizes: Sizes) -> Tensor:
    """Computes the product for groups of members; twice differentiable.

    Args:
        x: ``(rows, in)``; or ``(N, rows, in)``, if there is one group and nothing after it.
        weight: ``(out, in)``.
        bias: ``(out,)`` or ``None``.
        updates: For each group A ``(N, r, in)``, B ``(N, out, r)`` and s ``(N,)``, the last of any floating dtype.
        sizes: The groups' members and rows of each.

    Returns:
        ``(rows, out)``, or ``(N, rows, out)``.
    """
    if torch.is_grad_enabled():
        return _LowRank.apply(sizes, x, weight, bias, *(t for update in updates for t in update))
    y = F.linear(x, weight, bias)
    for (a, b, s), x_, y_ in zip(updates, _parts(x, sizes), _parts(y, sizes), strict=True):
        hidden = torch.bmm(a, x_.mT)
        if s.stride(0) or s.device.type != "cpu":  # elsewhere reading a number waits for the device
            y_.baddbmm_(hidden.mul_(_wide(s, b)).mT, b.mT)
        else:  # all members share it
            y_.baddbmm_(hidden.mT, b.mT, alpha=float(s[0]))
    return y


def _wide(scaling: Tensor, b: Tensor) -> Tensor:
    return scaling.to(b.dtype).view(-1, 1, 1)


def _parts(t: Tensor, sizes: Sizes) -> Sequence[Tensor]:
    """Returns each group's rows as ``(N, rows, features)``."""
    if t.ndim == 3:
        return (t,)
    parts: list[Tensor] = []
    start = 0
    for n, rows in sizes:
        parts.append(t[start : start + n * rows].view(n, rows, t.shape[-1]))
        start += n * rows
    return parts


class _LowRank(torch.autograd.Function):
    """Intermediates have the rank before the rows, ``(N, r, rows)``: small products are up to four times faster so."""

    @staticmethod
    def forward(ctx: Any, sizes: Sizes, x: Tensor, weight: Tensor, bias: Any, *updates: Tensor) -> Tensor:
        y, scaled = F.linear(x, weight, bias), []
        for i, (x_, y_) in enumerate(zip(_parts(x, sizes), _parts(y, sizes), strict=True)):
            a, b, s = updates[3 * i : 3 * i + 3]
            scaled.append(torch.bmm(a, x_.mT).mul_(_wide(s, b)))
            y_.baddbmm_(scaled[-1].mT, b.mT)
        ctx.sizes = sizes
        ctx.save_for_backward(x, weight, *updates, *scaled)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # the base class takes any number of gradients
        x, weight, *rest = ctx.saved_tensors
        wants, grad, again = ctx.needs_input_grad, grad.contiguous(), torch.is_grad_enabled()
        dx = grad @ weight if wants[1] else None
        parts = _parts(dx, ctx.sizes) if dx is not None and not again else ()
        of_updates: list[Tensor | None] = []
        added: list[Tensor] = []
        for i, (x_, g) in enumerate(zip(_parts(x, ctx.sizes), _parts(grad, ctx.sizes), strict=True)):
            a, b, s = rest[3 * i : 3 * i + 3]
            wide, through = _wide(s, b), torch.bmm(b.mT, g.mT)
            into = through * wide
            # a second derivative sees the saved product as a constant, so it is made anew there
            scaled = torch.bmm(a, x_.mT) * wide if again else rest[3 * len(ctx.sizes) + i]
            if parts:
                parts[i].baddbmm_(into.mT, a)
            elif dx is not None:
                added.append(torch.bmm(into.mT, a))
            want = wants[4 + 3 * i : 7 + 3 * i]
            of_updates += [
                torch.bmm(into, x_) if want[0] else None,
                torch.bmm(scaled, g).mT if want[1] else None,
                (through * torch.bmm(a, x_.mT)).sum((1, 2)).to(s.dtype) if want[2] else None,
            ]
        if dx is not None and added:
            dx = dx + _joined(added, dx)
        dw = grad.flatten(0, -2).mT @ x.flatten(0, -2) if wants[2] else None
        return None, dx, dw, grad.flatten(0, -2).sum(0) if wants[3] else None, *of_updates


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    if like.ndim == 3:
        return parts[0]
    flat = [p.flatten(0, 1) for p in parts]
    return torch.cat([*flat, like.new_zeros(like.shape[0] - sum(p.shape[0] for p in flat), like.shape[1])])
