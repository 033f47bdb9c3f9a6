r"""What NF4 and FP4 share: four-bit codes into 16 levels, one absmax scale per block of the flattened weight.

.. math:: \hat W_k = s_{\lfloor k / b \rfloor}\, c_{q_k}, \quad s = \max_{\text{block}} |W|

With ``double_quant`` the scales are stored in eight bits: less their mean, as codes into 256 levels of a dynamic data type,
one scale of their own per 256. Imports format.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft.quant.blocks import matrix_shape, quotient
from funcpeft.quant.format import Data, Format
from funcpeft.storage import Quantized

#: Scales per block of the second quantization.
NESTED = 256


@dataclass(frozen=True, kw_only=True)
class Lookup(Format):
    """Blockwise four-bit codes into a table.

    Args:
        block_size: Number of consecutive entries of the flattened weight that share a scale; even.
        double_quant: Whether the scales are quantized too.
    """

    block_size: int = 64
    double_quant: bool = False

    #: The level of every code.
    levels: ClassVar[tuple[float, ...]] = ()
    #: Name of the levels in bitsandbytes' kernel, ``""`` if it has none.
    kernel: ClassVar[str] = ""
    #: ``pair_table(levels)``, made once; a tracer makes its own, since it cannot take in a tensor from outside everywhere.
    pairs: ClassVar[Tensor]

    def __post_init__(self) -> None:
        size = self.block_size
        ok = isinstance(size, int) and not isinstance(size, bool) and size > 0 and size % 2 == 0
        self.require(ok, "block_size", "even and positive", size)
        self.require(isinstance(self.double_quant, bool), "double_quant", "True or False", self.double_quant)

    @property
    def clips(self) -> float:  # type: ignore[override]
        """A scale that its own rounding made smaller leaves its block's largest entries beyond the grid."""
        return 0.05 if self.double_quant else 0.0

    @property
    def refits_exactly(self) -> bool:  # type: ignore[override]
        """Scales less their mean, rounded, have another mean: double quantization drifts."""
        return not self.double_quant

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        return (cls(), cls(block_size=32), cls(block_size=128, double_quant=True))

    def encode(self, weight: Tensor) -> Data:
        blocks = self._blocks(weight)
        maxima = blocks.abs().amax(1)
        if not self.double_quant:
            return {"qdata": self._codes(blocks, maxima, weight.numel()), "scale": maxima}
        stored = nested(maxima)
        return {"qdata": self._codes(blocks, unnested(stored), weight.numel()), **stored}

    def encode_like(self, weight: Tensor, like: Quantized) -> Data:
        codes = self._codes(self._blocks(weight), self.scales(like), weight.numel())
        return {**like.data, "qdata": codes}

    def _blocks(self, weight: Tensor) -> Tensor:
        flat = weight.reshape(-1)
        return F.pad(flat, (0, -flat.numel() % self.block_size)).reshape(-1, self.block_size)

    def _codes(self, blocks: Tensor, scale: Tensor, count: int) -> Tensor:
        """Returns the codes of the nearest levels, two a byte, the earlier entry in the high half."""
        distinct = {level: i for i, level in reversed(list(enumerate(self.levels)))}  # FP4 has two zeros: the first is used
        order = [distinct[level] for level in sorted(distinct)]
        levels = torch.tensor([self.levels[i] for i in order], dtype=torch.float32, device=blocks.device)
        ranks = torch.bucketize(quotient(blocks, scale[:, None]), (levels[1:] + levels[:-1]) / 2)
        codes = torch.tensor(order, dtype=torch.uint8, device=blocks.device).index_select(0, ranks.reshape(-1))
        packed = (codes[0::2] << 4) | codes[1::2]
        return packed[: (count + 1) // 2].clone()  # the padding of the last block is not kept

    def scales(self, quantized: Quantized) -> Tensor:
        """Returns the float32 scale of every block."""
        return unnested(quantized.data) if self.double_quant else quantized.data["scale"]

    def decode(self, quantized: Quantized) -> Tensor:
        packed, scale, count = quantized.data["qdata"], self.scales(quantized), quantized.shape.numel()
        if self._kernel_is_right(quantized, scale):
            kind, shape = self.kernel, matrix_shape(quantized.shape)
            return torch.ops.bitsandbytes.dequantize_4bit(packed[:, None], scale, self.block_size, kind, shape, torch.float32)
        values, blocks = self._looked_up(packed), scale.shape[0]
        if count == values.shape[0] and count % self.block_size == 0:
            return _scaled(values.reshape(blocks, self.block_size), scale[:, None]).reshape(-1)
        values = F.pad(values, (0, blocks * self.block_size - values.shape[0]))
        return _scaled(values.reshape(blocks, self.block_size), scale[:, None]).reshape(-1)[:count]

    def _kernel_is_right(self, quantized: Quantized, scale: Tensor) -> bool:
        """Whether bitsandbytes, if this process has loaded it, decodes to the same bits: it counts blocks by rows on a CPU.

        Its kernel has no rule for ``vmap`` and no derivative with respect to scales.
        """
        loaded = sys.modules.get("bitsandbytes") is not None and hasattr(torch.ops.bitsandbytes, "dequantize_4bit")
        if not loaded or not self.kernel or scale.requires_grad or scale.device.type != "cpu":
            return False
        whole = matrix_shape(quantized.shape)[1] % self.block_size == 0
        return whole and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()

    def _looked_up(self, packed: Tensor) -> Tensor:
        """Returns the level of every code, float32; several by one look-up, which is what decoding takes time for."""
        if torch.compiler.is_compiling() or packed.device.type != "cpu":
            return pair_table(self.levels).to(packed.device).index_select(0, packed.long()).view(torch.float32)
        if packed.is_contiguous() and packed.shape[0] % 2 == 0 and packed.storage_offset() % 2 == 0:
            return quad_table(self.levels).index_select(0, packed.view(torch.uint16).int()).view(torch.float32)
        return self.pairs.index_select(0, packed.long()).view(torch.float32)

    def step(self, quantized: Quantized) -> Tensor:
        ordered = sorted(self.levels)
        widest = max(b - a for a, b in itertools.pairwise(ordered)) / 2
        steps = (self.scales(quantized).abs() * widest).repeat_interleave(self.block_size)
        return steps[: quantized.shape.numel()].reshape(quantized.shape)


def pair_table(levels: tuple[float, ...]) -> Tensor:
    """Returns, per byte, its two levels side by side as one 64-bit number: int64 ``(256,)``."""
    table, byte = torch.tensor(levels, dtype=torch.float32, device="cpu"), torch.arange(256, device="cpu")
    return torch.stack((table[byte >> 4], table[byte & 15]), dim=-1).view(torch.int64).reshape(-1)


@functools.cache
def quad_table(levels: tuple[float, ...]) -> Tensor:
    """Returns, per two bytes as this machine reads them, their four levels as one 128-bit number: complex128 ``(65536,)``."""
    both = torch.arange(65536, dtype=torch.int32, device="cpu").to(torch.uint16).view(torch.uint8)
    return pair_table(levels).index_select(0, both.long()).view(torch.complex128)


def _scaled(values: Tensor, scale: Tensor) -> Tensor:
    """Multiplies in place: ``values`` is nobody else's, and fresh memory costs more than the arithmetic."""
    try:
        return values.mul_(scale)
    except RuntimeError:  # under a vmap over scales alone, there is no room for the axis
        return values * scale


# -- scales in eight bits ------------------------------------------------------------------------------------------------------


def dynamic_levels() -> Tensor:
    """Returns the 256 levels of the signed dynamic data type, ascending.

    A code is a sign, a run of i zeros that gives the decade 10^(i - 6), and a linear fraction in the bits that are left: the
    middles of 2^i equal parts of [0.1, 1]. With 0 and 1 added there are 256.

    References:
        Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, 2016, arXiv 1511.04561, section 3.
    """
    found = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2
        found += [x for m in (10 ** (i - 6) * means).tolist() for x in (m, -m)]
    return torch.tensor(sorted(found), dtype=torch.float32, device="cpu")


_DYNAMIC = dynamic_levels()
_DYNAMIC_LEVELS = tuple(_DYNAMIC.tolist())


def nested(maxima: Tensor) -> Data:
    """Stores scales in eight bits: ``scale`` uint8, ``nested_scale`` float32 per 256 of them, ``offset`` float32 0-d."""
    offset = maxima.mean()
    blocks = F.pad(maxima - offset, (0, -maxima.numel() % NESTED)).reshape(-1, NESTED)
    largest, levels = blocks.abs().amax(1), _DYNAMIC.to(maxima.device)
    codes = torch.bucketize(quotient(blocks, largest[:, None]), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return {"scale": codes.reshape(-1)[: maxima.numel()].clone(), "nested_scale": largest, "offset": offset}


def unnested(data: Mapping[str, Tensor]) -> Tensor:
    """Inverts ``nested`` up to rounding."""
    codes, largest = data["scale"], data["nested_scale"]
    levels = torch.tensor(_DYNAMIC_LEVELS, dtype=torch.float32) if torch.compiler.is_compiling() else _DYNAMIC
    values = levels.to(codes.device).index_select(0, codes.long())
    values = F.pad(values, (0, -values.shape[0] % NESTED)).reshape(-1, NESTED) * largest[:, None]
    return values.reshape(-1)[: codes.shape[0]] + data["offset"]
