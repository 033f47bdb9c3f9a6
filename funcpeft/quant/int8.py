r"""Int8: the weights of LLM.int8(): codes from -127 to 127, one absmax per output row.

.. math:: \hat W_{ij} = q_{ij}\, s_i / 127, \quad s_i = \max_j |W_{ij}|

qdata: int8, the matrix ``(rows, columns)``; scale: float32 ``(rows,)``, the absmax itself. As bitsandbytes stores them (CB and
SCB), bit for bit. LLM.int8()'s outlier columns are a rule for activations and not part of the weight.

References:
    Dettmers et al., LLM.int8(), 2022, arXiv 2208.07339, section 2.1 (row-wise absmax).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from funcpeft.quant.blocks import quotient
from funcpeft.quant.format import Data, Format
from funcpeft.storage import Quantized


@dataclass(frozen=True, kw_only=True)
class Int8(Format):
    """Row-wise absmax int8."""

    refits_exactly: ClassVar[bool] = False  # 127 * s * (1 / 127) may miss s by an ulp in float32

    def misfit(self, shape: torch.Size) -> str | None:
        return None if len(shape) >= 2 else "a weight with rows is required"

    def encode(self, weight: Tensor) -> Data:
        scale = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
        return {"qdata": _codes(weight, scale), "scale": scale}

    def encode_like(self, weight: Tensor, like: Quantized) -> Data:
        return {"qdata": _codes(weight, like.data["scale"]), "scale": like.data["scale"]}

    def decode(self, quantized: Quantized) -> Tensor:
        return quantized.data["qdata"].to(torch.float32) * quantized.data["scale"][:, None] * (1 / 127)

    def step(self, quantized: Quantized) -> Tensor:
        return (quantized.data["scale"] / 254)[:, None].expand(quantized.data["qdata"].shape).reshape(quantized.shape)

    def grid(self, quantized: Quantized) -> tuple[Tensor, Tensor]:
        scale = quantized.data["scale"][:, None] / 127
        return scale, torch.zeros_like(scale)


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight * quotient(torch.full_like(scale, 127), scale)[:, None]).round().clamp(-127, 127).to(torch.int8)
