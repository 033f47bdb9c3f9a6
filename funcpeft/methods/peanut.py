r"""PEANuT: weight-aware neural tweakers, an update computed from the weight by a small network.

.. math:: W' = W + s B H^\top, \qquad H_0 = \sigma((A W)^\top), \quad H \leftarrow \sigma(H E_j^\top), \quad
   H \leftarrow \sigma(H F_j^\top) + H_{d - 1 - j}

A (r, out), B (out, r): trained; E, F (d, r, r): encoders and decoders with residual connections, d = ``depth``. A meets the
weight from the output side. A W is the derivative of the base's output contracted with A, so the weight is never made
dense.

References:
    Zhong et al., PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers, 2024,
    arXiv 2410.01870, eq. (4) and (6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


#: The activations of transformers that have no parameters of their own, under their names there.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "hardswish": F.hardswish,
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5))),
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class PEANuT(Method):
    """Adaptation by a network that reads the weight.

    Args:
        r: Width of the network.
        depth: Number d of encoders, and of decoders.
        act_fn: Activation: a name of ``ACTIVATIONS``.
        scaling: What multiplies the update.
        init_weights: Whether B starts at 0; else it is drawn as A is.
    """

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    peft_type: ClassVar[str] = "PEANUT"
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "E", "F", "scaling")
    weight_free: ClassVar[bool] = True
    size: ClassVar[str] = "2 * r * out + 2 * depth * r * r"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        self.require(0 <= self.depth <= 1000, "depth", "from 0 to 1000", self.depth)
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(errors.one_of(self.label, "act_fn", self.act_fn, ACTIVATIONS))

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(r=2, act_fn="tanh", scaling=0.5), cls(r=2, depth=2, act_fn="silu")

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        r, d, out = self.r, self.depth, base.shape[-2]
        for shape in ((r, out), *((r, r),) * (2 * d), (out, r)):  # as the layers that peft makes and then resets
            rng.kaiming(shape, gen)
        leaves = {"A": rng.kaiming((r, out), gen)}
        if d:
            leaves["E"] = torch.stack([rng.kaiming((r, r), gen) for _ in range(d)])
            leaves["F"] = torch.stack([rng.kaiming((r, r), gen) for _ in range(d)])
        leaves["B"] = torch.zeros(out, r) if self.init_weights else rng.kaiming((out, r), gen)
        return leaves, {"scaling": torch.tensor(self.scaling, dtype=torch.float64)}

    def hidden(self, leaves: Leaves, met: Tensor) -> Tensor:
        """Computes H ``(in, r)`` of A W ``(r, in)``."""
        act, h, kept = ACTIVATIONS[self.act_fn], met.mT, []
        h = act(h)
        for e in leaves["E"].unbind() if "E" in leaves else ():
            kept.append(h)
            h = act(h @ e.mT)
        for f in leaves["F"].unbind() if "F" in leaves else ():
            h = act(h @ f.mT) + kept.pop()
        return h

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        a, b = leaves["A"], leaves["B"]
        h = self.hidden(leaves, base.adjoint(a).to(a.dtype))
        return base(x) + leaves["scaling"] * ((x.to(a.dtype) @ h) @ b.mT)

    def merge(self, leaves: Leaves, base: Base) -> Base:
        h = self.hidden(leaves, leaves["A"] @ base.weight)
        return base.replace(weight=base.weight + leaves["scaling"] * (leaves["B"] @ h.mT))

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        made = {f"peanut_{name}.weight": leaves[name] for name in ("A", "B")}
        for name, key in (("E", "encoders"), ("F", "decoders")):
            made |= {f"peanut_{key}.{j}.weight": t for j, t in enumerate(leaves[name].unbind() if name in leaves else ())}
        return made

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        leaves = {name: tensors[f"peanut_{name}.weight"] for name in ("A", "B")}
        for name, key in (("E", "encoders"), ("F", "decoders")) if self.depth else ():
            leaves[name] = torch.stack([tensors[f"peanut_{key}.{j}.weight"] for j in range(self.depth)])
        return leaves
