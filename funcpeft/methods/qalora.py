r"""QA-LoRA: quantization-aware low-rank adaptation, whose update is constant along groups of inputs.

.. math:: y = W x + s \, B A \, \frac{n}{g} \sum_{\text{group}} x, \qquad
   W' = W + s \, B A', \quad A'_{:, j} = A_{:, \lfloor j / g \rfloor} \, n / g

A (r, n), B (out, r): trained; g: group size; n = in / g groups, whose mean input, times n, A meets. The update shifts all
weights of a group alike. So on a base of integers that is stored in these groups, or in parts of them, it fits into the zero
points, z' = z - update / scale: ``into_zeros`` returns such a weight, in which every code stays and nothing is rounded away.
``merge`` gives the dense weight, as for any other base.

References:
    Xu et al., QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models, 2023, arXiv 2309.14717, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Method
from funcpeft.methods.lora import LoRA
from funcpeft.storage import Quantized
from funcpeft.tree import Leaves
from funcpeft.weights import Base


@dataclass(frozen=True, kw_only=True)
class QALoRA(LoRA):
    """Low-rank adaptation of group means.

    Args:
        qalora_group_size: Number g of consecutive inputs in a group; must divide in.

    Other fields are those of ``LoRA``; ``lora_bias`` must be ``False``, and ``init_lora_weights`` ``True``, ``False`` or
    ``"gaussian"``, with which B starts; A is uniform. peft applies the method to GPTQ layers only, and silently makes plain
    LoRA of it elsewhere; here it is the same on every base.
    """

    qalora_group_size: int = 16

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed"})
    peft_fixed: ClassVar[dict[str, Any]] = {
        **{k: v for k, v in LoRA.peft_fixed.items() if k != "qalora_group_size"},
        "use_qalora": True,
    }
    peft_switch: ClassVar[str] = "use_qalora"
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "scaling", "rank")
    size: ClassVar[str] = "r * (in_ // qalora_group_size + out)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("qalora_group_size")
        drawn = isinstance(self.init_lora_weights, bool) or self.init_lora_weights == "gaussian"
        self.require(drawn, "init_lora_weights", "True, False or 'gaussian'", self.init_lora_weights)
        self.require(not self.lora_bias, "lora_bias", "False", self.lora_bias)

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return (cls(r=2, lora_alpha=3, lora_dropout=0.25, qalora_group_size=2, rank_pattern={"second": 1}),)

    def check_site(self, base: Base) -> None:
        super().check_site(base)
        in_, g = base.shape[-1], self.qalora_group_size
        self.require_at(in_ % g == 0, base, f"qalora_group_size must divide in {in_}", g)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        params, consts = super().init_site(base, gen)
        return {**params, "A": rng.kaiming((self.rank(base.path), base.shape[-1] // self.qalora_group_size), gen)}, consts

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        g, a = self.qalora_group_size, leaves["A"]
        return leaves["scaling"] * (leaves["B"] @ (a * (a.shape[-1] / g)).repeat_interleave(g, dim=-1))

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        a = leaves["A"]
        dropped = context.dropout(x, self.lora_dropout).to(a.dtype)
        pooled = dropped.unflatten(-1, (a.shape[-1], self.qalora_group_size)).mean(-1) * a.shape[-1]
        return base(x) + leaves["scaling"] * F.linear(F.linear(pooled, a), leaves["B"])

    def into_zeros(self, leaves: Leaves, base: Base) -> Quantized:
        """Returns the stored weight of a layer with the update in its zero points; codes and scales are those of the base.

        Args:
            leaves: The leaves at the site.
            base: The layer, whose weight is an ``AffineInt`` with blocks of consecutive inputs.

        Raises:
            TypeError: If the weight is not stored so.
            ValueError: If a block holds inputs of several groups, or a scale is zero.
        """
        stored, g = base.quantized, self.qalora_group_size
        rule, remedy = "zeros of blocks of consecutive inputs are required", "use AffineInt with an int block_size"
        unfit = TypeError(errors.say(f"{self.label} at {base.path!r}", rule, getattr(stored, "format", None), remedy))
        if stored is None or base.kind.name != "linear" or stored.format.label != "affineint" or "g_idx" in stored.data:
            raise unfit
        scale, zero = stored.format.grid(stored)
        if scale.numel() != stored.data["scale"].numel():  # blocks of several rows
            raise unfit
        size = stored.format.block_size
        size = base.shape[-1] if scale.shape[-1] == 1 else size[-1] if isinstance(size, tuple) else size
        self.require_at(g % size == 0, base, f"a block of {size} inputs must divide qalora_group_size", g)
        self.require_at(bool((scale != 0).all()), base, "scales must not be zero to hold an update", "0", "use net.merge")
        update = self.delta(leaves, base).to(torch.float32)[:, ::size]
        data = {name: t for name, t in stored.data.items() if name != "shift"}
        return replace(stored, data={**data, "zero_point": (zero - update / scale).reshape(data["scale"].shape)})
