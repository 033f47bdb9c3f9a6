r"""VeLoRA: LoRA that keeps one number per group of inputs for the backward pass.

.. math:: y = W x + s B A x, \qquad \nabla A = (s B^\top \nabla y)^\top \hat x, \quad
   \hat x_g = c \, \langle x_g, e \rangle \, e

The forward is LoRA's. In training, inputs are cut into G groups of d = ceil(in / G) numbers, of which only the coordinate
along a unit direction e (d,) is kept; the gradient of A is that of the reconstruction, scaled by c. All other gradients are
exact.

e is frozen: random; or (``"batch_average"``) the direction of the mean group of the very batch, found anew in every
training call and so no state; or (``"batch_average_once"``) that of one batch, which ``averaged`` puts into an adapter.

References:
    Miles et al., VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections, 2024, arXiv 2405.17991, eq. (2) to (4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import FrozenDict, Method
from funcpeft.methods.lora import LoRA
from funcpeft.tree import Adapter, Leaves
from funcpeft.weights import Base

_DEFAULTS: dict[str, Any] = {"num_groups": 64, "scale": 1.0, "init_type": "batch_average"}
_STARTS = ("batch_average", "batch_average_once", "random")


def grouped(x: Tensor, groups: int) -> Tensor:
    """Cuts the last axis into ``groups`` pieces ``(..., groups, d)``, filled up with zeros."""
    d = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * d - x.shape[-1])).unflatten(-1, (groups, d))


def unit(direction: Tensor) -> Tensor:
    """Returns a direction of length 1; where it is zero, that of all ones."""
    square = direction.square().sum()
    ones = torch.full_like(direction, direction.shape[0] ** -0.5)
    return torch.where(square > 0, direction / torch.where(square > 0, square, 1).sqrt(), ones)


class _Compressed(torch.autograd.Function):
    """``x @ a.T`` that keeps of ``x`` its coordinates along a direction."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor, e: Tensor, groups: int, scale: float) -> tuple[Tensor, Tensor]:
        return F.linear(x, a), grouped(x, groups) @ e

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, a, e, _, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], a, e)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        coordinates, a, e = ctx.saved_tensors
        seen = (coordinates[..., None] * e).flatten(-2)[..., : a.shape[-1]] * ctx.scale
        return grad @ a, grad.flatten(0, -2).mT @ seen.flatten(0, -2), None, None, None


@dataclass(frozen=True, kw_only=True)
class VeLoRA(LoRA):
    """Low-rank adaptation with compressed activations.

    Args:
        velora_config: ``num_groups`` (64): number G of groups; ``scale`` (1.0): c; ``init_type``: ``"batch_average"``,
            ``"batch_average_once"`` or ``"random"``.

    Other fields are those of ``LoRA``.
    """

    velora_config: Mapping[str, Any] | None = None

    peft_switch: ClassVar[str] = "velora_config"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed"})
    keys: ClassVar[dict[str, Any]] = {**LoRA.keys, "e": "lora_velora_embed"}
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "A0", "B0", "bias", "e", "scaling", "rank")
    size: ClassVar[str] = "r * (in_ + out)"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = dict(self.velora_config or {})
        for name in given.keys() - _DEFAULTS.keys():
            raise ValueError(errors.one_of(self.label, "an entry of velora_config", name, _DEFAULTS))
        settled = {**_DEFAULTS, **given}
        n, scale = settled["num_groups"], settled["scale"]
        self.require(isinstance(n, int) and n > 0, "num_groups of velora_config", "a positive integer", n)
        self.require(scale > 0, "scale of velora_config", "positive", scale)
        if settled["init_type"] not in _STARTS:
            raise ValueError(errors.one_of(self.label, "init_type of velora_config", settled["init_type"], _STARTS))
        object.__setattr__(self, "velora_config", FrozenDict(settled))

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return (cls(r=2, lora_alpha=3, lora_dropout=0.25, velora_config={"num_groups": 2, "init_type": "random"}),)

    def option(self, name: str) -> Any:
        """Returns an entry of ``velora_config``."""
        assert self.velora_config is not None
        return self.velora_config[name]

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        params, consts = super().init_site(base, gen)
        d = -(-base.shape[-1] // self.option("num_groups"))
        drawn = self.option("init_type") == "random"
        return params, {**consts, "e": unit(rng.randn((d,), gen)) if drawn else torch.zeros(d)}

    def averaged(self, adapter: Adapter, means: Mapping[str, Tensor]) -> Adapter:
        """Returns the adapter with the directions of mean inputs ``(in,)`` by site, for ``"batch_average_once"``."""
        made = {p: unit(grouped(m, self.option("num_groups")).mean(0)) for p, m in means.items()}
        return adapter.replace(
            consts={p: {**v, "e": made[p].to(v["e"])} if p in made else v for p, v in adapter.consts.items()}
        )

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        if not context.training:
            return super().apply(leaves, base, x, context)
        a = leaves["A"]
        dropped = context.dropout(x, self.lora_dropout).to(a.dtype)
        e, groups = leaves["e"], self.option("num_groups")
        if self.option("init_type") == "batch_average":
            e = unit(grouped(dropped.detach(), groups).flatten(0, -2).mean(0))
        low = _Compressed.apply(dropped, a, e, groups, self.option("scale"))[0]
        y = F.linear(low, leaves["B"], leaves.get("bias"))
        if "A0" in leaves:
            y = y - F.linear(F.linear(dropped, leaves["A0"]), leaves["B0"])
        return base(x) + leaves["scaling"] * y
