r"""Ternary: codes -1, 0 and 1 in two bits, one scale per weight (BitNet b1.58).

.. math:: \hat W_{ij} = t_{ij} / m, \quad t \in \{-1, 0, 1\}

qdata: uint8 ``(ceil(R / 4), C)`` for a matrix of R rows; a byte holds t + 1 of the rows r, r + ceil(R / 4), ... of its
column, from the low bits up. inverse_scale: floating ``()`` or ``(1,)``, the m that divides. Without ``inverse`` the number
is one that multiplies, scale: floating ``()`` or ``(1,)``. transformers stores both under the name ``weight_scale``: its
``BitLinear`` divides by it, its ``AutoBitLinear`` multiplies. Those layers hold weights of 4k rows only; the packing itself
takes any number, the two bits of absent rows being 0. The eight-bit rounding of activations in these layers is no part of
the weight.

References:
    Ma et al., The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits, 2024, arXiv 2402.17764, eqs. (1) to (3)
    (absmean rounding).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft.quant.blocks import matrix_shape
from funcpeft.quant.format import Data, Format
from funcpeft.storage import Quantized

#: transformers' bound on the mean of the absolute weights, so that a weight of zeros has a finite inverse scale.
SMALLEST = 1e-5


@dataclass(frozen=True, kw_only=True)
class Ternary(Format):
    """Ternary codes with one scale.

    Args:
        inverse: Whether the stored number divides (``inverse_scale``) or multiplies (``scale``).
    """

    inverse: bool = True

    #: The mean of the absolute decoded weight counts its zeros, so a refit has smaller scales; the codes stay.
    refits_exactly: ClassVar[bool] = False
    #: Entries beyond 1.5 times the mean are clipped: of a normal weight 23 in 100, more where rows are zero.
    clips: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        self.require(isinstance(self.inverse, bool), "inverse", "True or False", self.inverse)

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        return (cls(), cls(inverse=False))

    def misfit(self, shape: torch.Size) -> str | None:
        return None if len(shape) >= 2 else "a weight with rows is required"

    def encode(self, weight: Tensor) -> Data:
        mean = weight.abs().mean() if weight.numel() else weight.new_zeros(())
        mean = mean.clamp(min=SMALLEST)
        number = {"inverse_scale": 1 / mean} if self.inverse else {"scale": mean}
        return {"qdata": _packed(weight, self._factor(number)), **number}

    def encode_like(self, weight: Tensor, like: Quantized) -> Data:
        return {**like.data, "qdata": _packed(weight, self._factor(like.data))}

    def _factor(self, data: Mapping[str, Tensor]) -> Tensor:
        return data["inverse_scale"].to(torch.float32) if self.inverse else 1 / data["scale"].to(torch.float32)

    def _scale(self, quantized: Quantized) -> Tensor:
        data = quantized.data
        return 1 / data["inverse_scale"].to(torch.float32) if self.inverse else data["scale"].to(torch.float32)

    def decode(self, quantized: Quantized) -> Tensor:
        packed, (rows, columns) = quantized.data["qdata"], matrix_shape(quantized.shape)
        codes = torch.stack([packed & 3, (packed >> 2) & 3, (packed >> 4) & 3, packed >> 6]).view(torch.int8) - 1
        # t * (1 / m) is t / m bit for bit, t being -1, 0 or 1
        return codes.reshape(4 * packed.shape[0], columns)[:rows].to(torch.float32) * self._scale(quantized)

    def step(self, quantized: Quantized) -> Tensor:
        return (self._scale(quantized) / 2).reshape(()).expand(quantized.shape)

    def grid(self, quantized: Quantized) -> tuple[Tensor, Tensor]:
        scale = self._scale(quantized).reshape(1, 1).expand(matrix_shape(quantized.shape)[0], 1)
        return scale, torch.ones_like(scale)


def _packed(weight: Tensor, factor: Tensor) -> Tensor:
    codes = ((weight * factor).clamp(-1, 1).round() + 1).to(torch.uint8)
    a, b, c, d = F.pad(codes, (0, 0, 0, -codes.shape[0] % 4)).chunk(4)
    return a | (b << 2) | (c << 4) | (d << 6)
