r"""NF4: four bits at the quantiles of a normal distribution, one absmax scale per block.

.. math:: \hat W_k = s_{\lfloor k / b \rfloor}\, c_{q_k}, \quad s = \max_{\text{block}} |W|

c: the 16 levels, from -1 to 1 with an exact 0; b: block size, counted along the flattened weight. qdata: uint8, two codes a
byte, the earlier entry in the high half; scale: float32, one per block.

References:
    Dettmers et al., QLoRA, 2023, arXiv 2305.14314, section 3 and appendix E (the levels).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft.quant.format import Format
from funcpeft.weights import Quantized

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NF4(Format):
    """Blockwise 4-bit NormalFloat.

    Args:
        block_size: Number of consecutive entries that share a scale; even.
    """

    block_size: int = 64

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.block_size % 2:
            raise ValueError(f"nf4: block_size must be even and positive, got {self.block_size}.")

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        flat = weight.reshape(-1)
        blocks = F.pad(flat, (0, -flat.numel() % self.block_size)).reshape(-1, self.block_size)
        scale = blocks.abs().amax(1)
        levels = torch.tensor(LEVELS, dtype=torch.float32, device=weight.device)
        unit = torch.where(scale[:, None] > 0, blocks / torch.where(scale > 0, scale, 1)[:, None], 0)
        codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2).reshape(-1).to(torch.uint8)
        packed = (codes[0::2] << 4) | codes[1::2]
        return {"qdata": packed[: (flat.numel() + 1) // 2].clone(), "scale": scale}  # the padding is not kept

    def decode(self, quantized: Quantized) -> Tensor:
        packed, blocks = quantized.data["qdata"], quantized.data["scale"].shape[0]
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1)
        codes = F.pad(codes, (0, blocks * self.block_size - codes.shape[0])).reshape(blocks, self.block_size)
        levels = torch.tensor(LEVELS, dtype=torch.float32, device=packed.device)
        values = levels[codes.to(torch.int64)] * quantized.data["scale"][:, None]
        return values.reshape(-1)[: quantized.shape.numel()].reshape(quantized.shape)

    def step(self, quantized: Quantized) -> Tensor:
        widest = max(b - a for a, b in itertools.pairwise(LEVELS)) / 2
        steps = (quantized.data["scale"] * widest).repeat_interleave(self.block_size)
        return steps[: quantized.shape.numel()].reshape(quantized.shape)
