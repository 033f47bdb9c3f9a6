r"""RoAd: outputs are rotated and scaled in pairs.

.. math:: y' = R (W x + b), \quad
    \begin{pmatrix} y'_j \\ y'_{j+h} \end{pmatrix} =
    \begin{pmatrix} c_j & -s_j \\ s_{j+h} & c_{j+h} \end{pmatrix} \begin{pmatrix} y_j \\ y_{j+h} \end{pmatrix}

Outputs are cut into groups of g = 2h, and element j of a group is paired with j + h. theta, alpha: leaves of size out / 2
(``road_1``: the two of a pair share an angle and a scale, c = alpha cos theta, s = alpha sin theta), out (``road_2``: each
has its own) or 2 out (``road_4``: c and s have their own too). The bias is rotated with the weight: W' = R W, b' = R b.

References:
    Liao and Monz, 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability, 2024,
    arXiv 2409.00119.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Method
from funcpeft.tree import Leaves
from funcpeft.weights import Base

_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}


def turn(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Maps the pairs of ``z (..., groups * 2 * h)`` by [[c, -s], [s', c']], ``cos`` and ``sin`` being ``(groups, 2, h)``."""
    pairs = z.unflatten(-1, cos.shape)
    first, second = pairs.unbind(-2)
    crossed = torch.stack([-second, first], -2)
    return (cos * pairs + sin * crossed).flatten(-3)


@dataclass(frozen=True, kw_only=True)
class RoAd(Method):
    """Two-dimensional rotary adaptation.

    Args:
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``: half, one or two angles and scales per output.
        group_size: Number of outputs in a group; even, and divides the outputs of every layer.
        init_weights: ``True`` for the identity; ``False`` for theta ~ N(0, 0.5^2), alpha ~ N(1, 0.5^2).
    """

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    peft_type: ClassVar[str] = "ROAD"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    keys: ClassVar[dict[str, str]] = {"theta": "road_theta", "alpha": "road_alpha"}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    size: ClassVar[str] = "out"
    leaf_names: ClassVar[tuple[str, ...]] = ("theta", "alpha")
    weight_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in _SIZES:
            raise ValueError(errors.one_of(self.label, "variant", self.variant, _SIZES))
        size = self.group_size
        self.require(size > 0 and size % 2 == 0, "group_size", "a positive even integer", size)

    @classmethod
    def examples(cls) -> tuple[RoAd, ...]:
        """Returns the three variants."""
        return cls(group_size=2), cls(group_size=4, variant="road_2"), cls(group_size=2, variant="road_4")

    def check_site(self, base: Base) -> None:
        out, size = base.shape[0], self.group_size
        even = ", ".join(str(d) for d in range(2, out + 1, 2) if out % d == 0)
        remedy = f"use an even divisor ({even})" if even else "leave the site out of target_modules"
        self.require_at(out % size == 0, base, f"group_size must divide the {out} output features", size, remedy)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        size = (int(base.shape[0] * _SIZES[self.variant]),)
        if self.init_weights:
            return {"theta": torch.zeros(size), "alpha": torch.ones(size)}, {}
        return {"theta": rng.normal(size, gen, 0.5), "alpha": rng.normal(size, gen, 0.5, 1.0)}, {}

    def coefficients(self, leaves: Leaves) -> tuple[Tensor, Tensor]:
        """Computes c and s, each ``(groups, 2, h)``."""
        h = self.group_size // 2
        theta, alpha = leaves["theta"], leaves["alpha"]
        cos, sin = alpha * theta.cos(), alpha * theta.sin()
        if self.variant == "road_4":
            return cos.reshape(-1, 2, 2, h)[:, 0], sin.reshape(-1, 2, 2, h)[:, 1]
        if self.variant == "road_2":
            return cos.reshape(-1, 2, h), sin.reshape(-1, 2, h)
        return cos.reshape(-1, 1, h).expand(-1, 2, h), sin.reshape(-1, 1, h).expand(-1, 2, h)

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        return turn(base(x), *self.coefficients(leaves))

    def merge(self, leaves: Leaves, base: Base) -> Base:
        return _turned(base, *self.coefficients(leaves))

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        return _turned(base, *_inverse(*self.coefficients(leaves)))

    def unmerge_gain(self, leaves: Leaves, base: Base) -> Tensor | float:
        cos, sin = _inverse(*self.coefficients(leaves))
        return (cos.abs() + sin.abs()).amax()


def _turned(base: Base, cos: Tensor, sin: Tensor) -> Base:
    bias = base.bias
    return base.replace(weight=turn(base.weight.mT, cos, sin).mT, bias=None if bias is None else turn(bias, cos, sin))


def _inverse(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Inverts [[c, -s], [s', c']] in closed form: [[c', s], [-s', c]] / (c c' + s s')."""
    determinant = (cos.prod(-2) + sin.prod(-2)).unsqueeze(-2)
    return cos.flip(-2) / determinant, -sin / determinant
