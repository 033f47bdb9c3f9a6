r"""FP8: eight-bit floats with a float32 scale per tile.

.. math:: \hat W_{ij} = q_{ij}\, s_{\lfloor i / r \rfloor, \lfloor j / c \rfloor}, \quad s = \max_{\text{tile}} |W| / m

m: the largest level, 448 for e4m3 and 57344 for e5m2; r, c: rows and columns of a tile, which may be cut off at the edges.
qdata: float8_e4m3fn or float8_e5m2 ``(R, C)``; scale: float32 ``(ceil(R / r), ceil(C / c))``, a multiplier.

As torchao's ``Float8Tensor`` stores it (``"row"``, ``"tensor"``), compressed-tensors and fbgemm (``weight_scale``, ``"row"``)
and fine-grained fp8 checkpoints (``weight_scale_inv``, ``(128, 128)``: a multiplier too, despite its name). A refit is
torchao's, but for a scale that float32 would hold as a subnormal number or 0: the smallest normal number is stored instead,
where torchao 0.18 makes a row of zeros NaN.

References:
    Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv 2209.05433, section 3 (e4m3 and e5m2).
    DeepSeek-AI, DeepSeek-V3 Technical Report, 2024, arXiv 2412.19437, section 3.3.2 (tiles of 128 by 128).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcpeft.quant import blocks
from funcpeft.quant.format import Data, Format
from funcpeft.quant.minifloat import FLOAT8, TINY, Float8, block_misfit, quotient
from funcpeft.storage import Quantized


@dataclass(frozen=True, kw_only=True)
class FP8(Format):
    """Eight-bit floats with a scale per tile.

    Args:
        block_size: The entries that share a scale: ``"tensor"``, ``"row"``, a number of neighbours in a row, or a tile
            ``(rows, columns)``, the last of which may be ragged.
        kind: ``"e4m3"`` (three bits of mantissa) or ``"e5m2"`` (two, and a wider range).
    """

    block_size: blocks.BlockSize = "row"
    kind: str = "e4m3"

    def __post_init__(self) -> None:
        self.require(blocks.valid(self.block_size), "block_size", blocks.RULE, self.block_size)
        self.require(self.kind in FLOAT8, "kind", "'e4m3' or 'e5m2'", self.kind)

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        return (cls(), cls(block_size="tensor"), cls(block_size=8, kind="e5m2"), cls(block_size=(4, 16)))

    @property
    def element(self) -> Float8:
        """How the codes are stored."""
        return FLOAT8[self.kind]

    def misfit(self, shape: torch.Size) -> str | None:
        return block_misfit(shape, self.block_size if isinstance(self.block_size, int) else 1)

    def encode(self, weight: Tensor) -> Data:
        tile = blocks.tile_of(self.block_size, *weight.shape)
        scale = (blocks.maxima(weight, tile) / self.element.largest).clamp(min=TINY)
        return {"qdata": self._codes(weight, scale), "scale": scale}

    def encode_like(self, weight: Tensor, like: Quantized) -> Data:
        return {"qdata": self._codes(weight, like.data["scale"]), "scale": like.data["scale"]}

    def _codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        tile = blocks.tile_of(self.block_size, *weight.shape)
        return self.element.codes(blocks.over_tiles(quotient, weight, tile, scale))

    def decode(self, quantized: Quantized) -> Tensor:
        return self._scaled(self.element.values(quantized.data["qdata"]), quantized)

    def step(self, quantized: Quantized) -> Tensor:
        return self._scaled(self.element.half_gaps(quantized.data["qdata"]), quantized).reshape(quantized.shape)

    def _scaled(self, values: Tensor, quantized: Quantized) -> Tensor:
        rows, columns = blocks.matrix_shape(quantized.shape)
        tile = blocks.tile_of(self.block_size, rows, columns)
        return blocks.over_tiles(torch.mul, values.reshape(rows, columns), tile, quantized.data["scale"])
