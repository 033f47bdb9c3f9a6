r"""Int8: one scale per output row, codes from -127 to 127.

.. math:: \hat W_{ij} = q_{ij}\, s_i, \quad s_i = \max_j |W_{ij}| / 127

qdata: int8 codes, the weight's shape; scale: float32, one per row of the stored weight.

References:
    Dettmers et al., LLM.int8(), 2022, arXiv 2208.07339, section 2.1 (row-wise absmax; no outlier decomposition here).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcpeft.quant.format import Format
from funcpeft.weights import Quantized


@dataclass(frozen=True, kw_only=True)
class Int8(Format):
    """Row-wise absmax int8."""

    def misfit(self, shape: torch.Size) -> str | None:
        return None if len(shape) >= 2 else "a weight with rows is required"

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().flatten(1).amax(1) / 127
        shaped = scale.reshape(-1, *(1,) * (weight.ndim - 1))
        codes = torch.where(shaped > 0, weight / torch.where(shaped > 0, shaped, 1), 0).round()
        return {"qdata": codes.clamp(-127, 127).to(torch.int8), "scale": scale}

    def decode(self, quantized: Quantized) -> Tensor:
        codes, scale = quantized.data["qdata"], quantized.data["scale"]
        return codes.to(torch.float32) * scale.reshape(-1, *(1,) * (codes.ndim - 1))

    def step(self, quantized: Quantized) -> Tensor:
        scale = quantized.data["scale"].reshape(-1, *(1,) * (len(quantized.shape) - 1))
        return (scale / 2).expand(quantized.shape)
