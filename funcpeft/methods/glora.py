r"""GLoRA: generalised low-rank adaptation, of the weight and the bias.

.. math:: W' = W + W \odot A + B, \qquad b' = b + b \odot D + E + W c

A, B: (out, in) as products of two low-rank factors, or a vector (out,) or a number that is the same along the rest; c (in,): a
product of low-rank factors, or a vector; D, E: vectors (out,) or numbers. Any may be absent; without a bias c, D and E are. The
dense weight is not needed: W o (Ad Au) x = sum_k Ad_k o (W (x o Au_k)), one call of the base on r scaled copies of x.

References:
    Chavan et al., One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, 2023, arXiv 2306.07967, eq. (10).
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
from funcpeft.method import Method
from funcpeft.tree import Leaves
from funcpeft.weights import Base

_FORMS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("constant", "vector", "none"),
}
_TERMS = "ABCDE"


@dataclass(frozen=True, kw_only=True)
class GLoRA(Method):
    """Adaptation that scales and shifts weight and bias.

    Args:
        r: Rank of the low-rank terms.
        config_A_B: Form of A and B: ``"lora"``, ``"vector"``, ``"constant"`` or ``"none"``.
        config_C: Form of c: ``"lora"``, ``"vector"`` or ``"none"``.
        config_D_E: Form of D and E: ``"constant"``, ``"vector"`` or ``"none"``.
        init_weights: Whether the start is neutral.
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"glora_only"`` those of the targets.
    """

    r: int = 8
    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"
    init_weights: bool = True
    bias: str = "none"

    peft_type: ClassVar[str] = "GLORA"
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    leaf_names: ClassVar[tuple[str, ...]] = ("rank", *(f"{t}{part}" for t in _TERMS for part in ("d", "u", "")))
    rank_axes: ClassVar[dict[str, int]] = {f"{t}{part}": axis for t in "ABC" for part, axis in (("d", -1), ("u", -2))}
    weight_free: ClassVar[bool] = True
    bias_only: ClassVar[str] = "glora_only"
    size: ClassVar[str] = "2 * r * (in_ + out) + r * (in_ + 1) + 2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        for name, forms in _FORMS.items():
            if getattr(self, name) not in forms:
                raise ValueError(errors.one_of(self.label, name, getattr(self, name), forms))
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(r=2), cls(config_A_B="vector", config_C="vector", config_D_E="vector"), cls(config_A_B="constant", r=1)

    def form(self, term: str, base: Base) -> str:
        """Returns the form of one of the terms at a site."""
        if term in "AB":
            return self.config_A_B
        if base.site.bias is None:
            return "none"
        return self.config_C if term == "C" else self.config_D_E

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        (out, in_), leaves = base.shape, {}
        for term in _TERMS:
            rows, columns = (in_, 1) if term == "C" else (out, in_)
            match self.form(term, base):
                case "lora":
                    leaves[f"{term}u"] = rng.kaiming((self.r, columns), gen)
                    zero = torch.zeros(rows, self.r)
                    leaves[f"{term}d"] = zero if self.init_weights else rng.kaiming((rows, self.r), gen)
                case "vector":
                    shape = (rows, 1) if term in "ABC" else (1, rows)
                    leaves[term] = torch.zeros(rows) if self.init_weights else rng.kaiming(shape, gen).flatten()
                case "constant":
                    leaves[term] = torch.zeros(1) if self.init_weights else rng.normal((1,), gen, 0.02)
                case _:
                    pass
        return leaves, {"rank": torch.tensor(self.r)}

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        dtype = next((t.dtype for t in leaves.values() if t.is_floating_point()), x.dtype)
        y, x = base(x).to(dtype), x.to(dtype)
        plain = y if base.bias is None else y - base.bias.to(dtype)
        if "Ad" in leaves:
            scaled = x[None] * leaves["Au"].view(-1, *(1,) * (x.ndim - 1), x.shape[-1])
            met = base(scaled).to(dtype)
            met = met if base.bias is None else met - base.bias.to(dtype)
            y = y + torch.einsum("r...o,or->...o", met, leaves["Ad"])
            y = y + F.linear(F.linear(x, leaves["Bu"]), leaves["Bd"])
        elif "A" in leaves:
            y = y + plain * leaves["A"] + x.sum(-1, keepdim=True) * leaves["B"]
        if base.bias is None:
            return y
        bias = base.bias.to(dtype)
        if "D" in leaves:
            y = y + bias * leaves["D"] + leaves["E"]
        c = _vector(leaves)
        return y if c is None else y + base(c[None])[0].to(dtype) - bias

    def merge(self, leaves: Leaves, base: Base) -> Base:
        weight, bias = base.weight, base.bias
        if self.config_A_B != "none":
            weight = weight + base.weight * _matrix(leaves, "A") + _matrix(leaves, "B")
        if bias is not None and "D" in leaves:
            bias = bias + bias * leaves["D"] + leaves["E"]
        c = _vector(leaves)
        if bias is not None and c is not None:
            bias = bias + base.weight @ c
        return base.replace(weight=weight, bias=bias)

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        weight, bias = base.weight, base.bias
        if self.config_A_B != "none":
            factor = self._divisor(1 + _matrix(leaves, "A"), base)
            weight = (weight - _matrix(leaves, "B")) / factor
        c = _vector(leaves)
        if bias is not None and c is not None:
            bias = bias - weight @ c
        if bias is not None and "D" in leaves:
            bias = (bias - leaves["E"]) / self._divisor(1 + leaves["D"], base)
        return base.replace(weight=weight, bias=bias)

    def _divisor(self, factor: Tensor, base: Base) -> Tensor:
        if not torch.compiler.is_compiling() and bool((factor == 0).any()):
            rule, remedy = "an entry was scaled by 0, so merging does not invert", "keep the base params instead"
            raise errors.NoMergedFormError(errors.say(f"{self.label} at {base.path!r}", rule, None, remedy))
        return factor

    def unmerge_gain(self, leaves: Leaves, base: Base) -> Tensor | float:
        gain = torch.ones(())
        if self.config_A_B != "none":
            gain = (1 / (1 + _matrix(leaves, "A"))).abs().max().clamp(min=1)
        c = _vector(leaves)
        gain = gain if c is None else gain * (1 + c.abs().sum())
        return gain * (1 / (1 + leaves["D"])).abs().max().clamp(min=1) if "D" in leaves else gain

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        assert base is not None
        (out, in_), made = base.shape, {}
        for term in _TERMS:
            key = f"glora_{term}"
            match self.form(term, base):
                case "lora":
                    made |= {f"{key}.Xd": leaves[f"{term}d"], f"{key}.Xu": leaves[f"{term}u"]}
                case "vector":
                    made[f"{key}.X"] = leaves[term][:, None] if term in "ABC" else leaves[term]
                case "constant":
                    made[f"{key}.X"] = leaves[term]
                case _:  # peft keeps zeros of the whole shape where a term is absent
                    shape = {"A": (out, in_), "B": (out, in_), "C": (in_, 1)}.get(term, (out,))
                    made[f"{key}.zeros"] = torch.zeros(shape, dtype=torch.promote_types(base.dtype, torch.float32))
        return made

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        leaves: Leaves = {}
        for key, t in tensors.items():
            term, part = key.removeprefix("glora_").split(".")
            if part != "zeros":
                leaves[term + part.removeprefix("X")] = t if part != "X" else t.flatten()
        return leaves


def _matrix(leaves: Leaves, term: str) -> Tensor:
    """Returns A or B, of a shape that broadcasts to (out, in)."""
    return leaves[f"{term}d"] @ leaves[f"{term}u"] if f"{term}d" in leaves else leaves[term][:, None]


def _vector(leaves: Leaves) -> Tensor | None:
    """Returns c ``(in,)``, if there is one."""
    return (leaves["Cd"] @ leaves["Cu"])[:, 0] if "Cd" in leaves else leaves.get("C")
