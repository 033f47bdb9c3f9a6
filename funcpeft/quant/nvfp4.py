r"""NVFP4: four-bit floats in blocks of 16, an eight-bit float per block, a float32 for all.

.. math:: \hat W_{ij} = q_{ij}\, (t\, s_{i, \lfloor j / 16 \rfloor}), \quad t = \max |W| / 2688, \quad
    s = \operatorname{round}_{\text{e4m3}}(\max_{\text{block}} |W| / 6t)

q: one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (e2m1); 2688 = 448 * 6, the largest level of a scale times that of a
code. qdata: uint8 ``(R, C / 2)``, two codes a byte, the earlier entry in the low half; scale: float8_e4m3fn ``(R, C / 16)`` in
logical order; per_tensor_scale, t: float32 ``()``, or ``(E,)`` where each of E equal runs of rows has its own, as experts do.
Without ``per_tensor`` it is absent, and t = 1.

As torchao's ``NVFP4Tensor`` stores it, whose scales are moreover padded and reordered for tensor cores: ``swizzled`` and
``unswizzled``. A refit is torchao's too: a scale is at least 2^-6, the smallest normal number of e4m3.

References:
    Alvarez et al., Introducing NVFP4 for Efficient and Accurate Low-Precision Inference, NVIDIA technical blog, 2025.
    NVIDIA, cuBLAS documentation, 1D Block Scaling Factors Layout (the swizzle).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft.quant.format import Data, Format
from funcpeft.quant.minifloat import E2M1, FLOAT8, TINY, block_misfit, quotient
from funcpeft.storage import Quantized

_SCALE = FLOAT8["e4m3"]


@dataclass(frozen=True, kw_only=True)
class NVFP4(Format):
    """Blocks of 16 e2m1 codes with an e4m3 scale.

    Args:
        per_tensor: Whether a float32 scale for the whole weight comes first. Without it blocks below 0.094 lose precision and
            those above 2688 saturate.
    """

    per_tensor: bool = True

    block_size: ClassVar[int] = 16
    refits_exactly: ClassVar[bool] = False  # 6 * 448 * t rounds, so that t may come back with another last bit

    def __post_init__(self) -> None:
        self.require(isinstance(self.per_tensor, bool), "per_tensor", "True or False", self.per_tensor)

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        return (cls(), cls(per_tensor=False))

    def misfit(self, shape: torch.Size) -> str | None:
        return block_misfit(shape, self.block_size)

    def encode(self, weight: Tensor) -> Data:
        maxima = self._blocks(weight).abs().amax(2) / E2M1.largest
        whole = (weight.abs().amax() / (_SCALE.largest * E2M1.largest)).clamp(min=TINY)
        if self.per_tensor:
            maxima = maxima / whole
        scale = _SCALE.codes(maxima.clamp(min=torch.finfo(_SCALE.dtype).tiny))
        data = {"scale": scale, **({"per_tensor_scale": whole} if self.per_tensor else {})}
        return {"qdata": self._codes(weight, self._scales(data)), **data}

    def encode_like(self, weight: Tensor, like: Quantized) -> Data:
        return {**like.data, "qdata": self._codes(weight, self._scales(like.data))}

    def _blocks(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], -1, self.block_size)

    def _codes(self, weight: Tensor, scales: Tensor) -> Tensor:
        return E2M1.codes(quotient(self._blocks(weight), scales[..., None]).reshape(weight.shape))

    def _scales(self, data: Mapping[str, Tensor]) -> Tensor:
        """Returns the float32 factor of every block ``(R, C / 16)``."""
        scale = data["scale"].to(torch.float32)
        if not self.per_tensor:
            return scale
        whole = data["per_tensor_scale"].reshape(-1, 1)
        return (scale.reshape(whole.shape[0], -1) * whole).reshape(scale.shape)

    def decode(self, quantized: Quantized) -> Tensor:
        return self._scaled(E2M1.values(quantized.data["qdata"]), quantized)

    def step(self, quantized: Quantized) -> Tensor:
        return self._scaled(E2M1.half_gaps(quantized.data["qdata"]), quantized).reshape(quantized.shape)

    def _scaled(self, values: Tensor, quantized: Quantized) -> Tensor:
        return values.reshape(-1, self.block_size) * self._scales(quantized.data).reshape(-1, 1)


# -- the order in which tensor cores read scales -------------------------------------------------------------------------------


def swizzled(scale: Tensor) -> Tensor:
    """Reorders scales ``(R, S)`` of one byte for tensor cores.

    The matrix is padded with zeros to tiles of 128 rows and 4 columns, which follow each other row by row; a tile's row
    ``32 a + b`` becomes columns ``4 a`` to ``4 a + 3`` of row b of 32.

    Returns:
        ``(32 ceil(R / 128), 16 ceil(S / 4))`` of the same dtype: the shape that torchao gives it, of the tiles' bytes in order.
    """
    rows, columns = scale.shape
    padded = F.pad(scale.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = padded.reshape(-(-rows // 128), 4, 32, -(-columns // 4), 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 32, -(-columns // 4) * 16).view(scale.dtype)


def unswizzled(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Inverts ``swizzled``, of any shape with its bytes: returns ``(rows, columns)``."""
    tiles = scale.view(torch.uint8).reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -(-columns // 4) * 4)
    return padded[:rows, :columns].contiguous().view(scale.dtype)
