r"""The one product of a plain weight with low-rank updates of many members, and its derivative.

.. math:: y_n = x_n W^T + b + s_n (x_n A_n^T) B_n^T

Written out by hand because at small sizes the nodes of a tape cost more than the products do: the product with the weight is
one for all rows, and the updates are summed in place into the members' parts of it. Imports torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        x: ``(rows, in)``.
        weight: ``(out, in)``.
        bias: ``(out,)`` or ``None``.
        updates: For each group A ``(N, r, in)``, B ``(N, out, r)`` and s ``(N,)``, the last of any floating dtype.
        sizes: The groups' members and rows of each.

    Returns:
        ``(rows, out)``.
    """
    flat = [t for update in updates for t in update]
    if torch.is_grad_enabled():
        return _LowRank.apply(sizes, x, weight, bias, *flat)
    y = F.linear(x, weight, bias)
    for (a, b, s), x_, y_ in zip(updates, _parts(x, sizes), _parts(y, sizes), strict=True):
        hidden = torch.bmm(a, x_.mT).mT
        if not s.stride(0):  # all members share it
            y_.baddbmm_(hidden, b.mT, alpha=float(s[0]))
        else:
            y_.baddbmm_(hidden * s.to(b.dtype).view(-1, 1, 1), b.mT)
    return y


def _parts(t: Tensor, sizes: Sizes) -> Iterator[Tensor]:
    """Yields each group's rows as ``(N, rows, features)``."""
    start = 0
    for n, rows in sizes:
        stop = start + n * rows
        yield (t if stop - start == t.shape[0] else t[start:stop]).view(n, rows, t.shape[-1])
        start = stop


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: Sizes, x: Tensor, weight: Tensor, bias: Any, *updates: Tensor) -> Tensor:
        y, scaled = F.linear(x, weight, bias), []
        for i, (x_, y_) in enumerate(zip(_parts(x, sizes), _parts(y, sizes), strict=True)):
            a, b, s = updates[3 * i : 3 * i + 3]
            hidden = torch.bmm(a, x_.mT).mT.mul_(s.to(b.dtype).view(-1, 1, 1))
            y_.baddbmm_(hidden, b.mT)
            scaled.append(hidden)
        ctx.sizes = sizes
        ctx.save_for_backward(x, weight, *updates, *scaled)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]  # the base class takes any number of gradients
        x, weight, *rest = ctx.saved_tensors
        count, grad = 3 * len(ctx.sizes), grad.contiguous()
        updates, again = rest[:count], torch.is_grad_enabled()
        wants, of_updates = ctx.needs_input_grad, []
        dx = grad @ weight if wants[1] else None
        starts = [*_parts(x, ctx.sizes)], [*_parts(grad, ctx.sizes)], [] if dx is None else [*_parts(dx, ctx.sizes)]
        added: list[Tensor] = []
        for i, (x_, g) in enumerate(zip(*starts[:2], strict=True)):
            a, b, s = updates[3 * i : 3 * i + 3]
            want = wants[4 + 3 * i : 7 + 3 * i]
            wide = s.to(b.dtype).view(-1, 1, 1)
            through = torch.bmm(g, b)
            into = through * wide
            # a second derivative sees the saved product as a constant, so it is made anew there
            scaled = torch.bmm(x_, a.mT) * wide if again else rest[count + i]
            if dx is not None and again:
                added.append(torch.bmm(into, a).flatten(0, 1))
            elif dx is not None:
                starts[2][i].baddbmm_(into, a)
            of_updates += [
                torch.bmm(into.mT, x_) if want[0] else None,
                torch.bmm(g.mT, scaled) if want[1] else None,
                (through * torch.bmm(x_, a.mT)).sum((1, 2)).to(s.dtype) if want[2] else None,
            ]
        if dx is not None and added:
            done = sum(t.shape[0] for t in added)
            dx = dx + torch.cat([*added, dx.new_zeros(dx.shape[0] - done, dx.shape[1])])
        dw = grad.mT @ x if wants[2] else None
        return None, dx, dw, grad.sum(0) if wants[3] else None, *of_updates
