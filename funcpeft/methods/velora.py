r"""VeLoRA: LoRA that keeps one number per group of inputs for the backward pass.

.. math:: y = W x + s B A x, \qquad \nabla A = (s B^\top \nabla y)^\top \hat x, \quad
   \hat x_g = c \, \langle x_g, e \rangle \, e

The forward is LoRA's. In training, inputs are cut into G groups of d = ceil(in / G) numbers, of which only the coordinate
along a unit direction e (d,) is kept; the gradient of A is that of the reconstruction, scaled by c. All other gradients are
exact.

The coordinates are what is kept for the backward pass. With A_g (r, d) the columns of group g, and a bar over what is a
constant to differentiation, a training call computes

.. math:: A x = \bar A x + h - \bar h, \quad h = c \sum_g \overline{\langle x_g, e \rangle} \, A_g e

which has the value of A x bit for bit and these derivatives, in forward mode too.

e is frozen: random (``"random"``); the direction of the mean group of the very batch, found anew in every training call and
so no state (``"batch_average"``); or that of one batch, which ``averaged`` puts into an adapter (``"batch_average_once"``).
Until then it is zero, as in a file that peft wrote before it trained, and every batch has its own. peft 0.21 finds it again
after it has read a file; here the file's stays.

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
        self.require(type(n) is int and n > 0, "num_groups of velora_config", "a positive integer", n)
        self.require(isinstance(scale, int | float) and scale > 0, "scale of velora_config", "positive", scale)
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
        """Returns the adapter with the directions of the layers' mean inputs, for ``"batch_average_once"``.

        Args:
            adapter: One adapter.
            means: By site path, the mean over all tokens of a batch of what the layer gets, ``(in,)``.
        """
        consts = {path: dict(leaves) for path, leaves in adapter.consts.items()}
        for path, mean in means.items():
            if path not in consts:
                hint = errors.nearest(path, consts)
                raise errors.NameMissingError(errors.say(f"{self.label}: averaged", "paths must be of sites", repr(path), hint))
            width = adapter.params[path]["A"].shape[-1]
            if tuple(mean.shape) != (width,) or not mean.isfinite().all():
                where, rule = f"{self.label} at {path!r}", f"a mean input must be finite and have shape ({width},)"
                raise ValueError(errors.say(where, rule, tuple(mean.shape)))
            consts[path]["e"] = unit(grouped(mean, self.option("num_groups")).mean(0)).to(consts[path]["e"])
        return adapter.replace(consts=consts)

    def direction(self, e: Tensor, x: Tensor) -> Tensor:
        """Returns the direction for a batch of inputs ``(..., in)``, given the one that is kept."""
        if self.option("init_type") == "random":
            return e
        own = unit(grouped(x, self.option("num_groups")).flatten(0, -2).mean(0))
        return own if self.option("init_type") == "batch_average" else torch.where((e == 0).all(), own, e)

    def compressed(self, leaves: Leaves, x: Tensor) -> Tensor:
        """Computes ``x`` times the update, compressed for the backward pass."""
        a, groups = leaves["A"], self.option("num_groups")
        x = x.to(a.dtype)
        fixed = x.detach()
        e = self.direction(leaves["e"], fixed)
        h = self.option("scale") * F.linear(grouped(fixed, groups) @ e, grouped(a, groups) @ e)
        low = F.linear(x, a.detach()) + (h - h.detach())
        y = F.linear(low, leaves["B"], leaves.get("bias"))
        if "A0" in leaves:
            y = y - F.linear(F.linear(x, leaves["A0"]), leaves["B0"])
        return leaves["scaling"] * y

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        if not context.training:
            return super().apply(leaves, base, x, context)
        return base(x) + self.compressed(leaves, context.dropout(x, self.lora_dropout))
