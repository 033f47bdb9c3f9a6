r"""Codebook: every group of entries a sum of vectors, one from each of several codebooks (AQLM).

.. math:: \hat W_{og} = s_o \sum_{c=1}^{C} V_{c,\, q_{ogc}}

o counts groups of ``out_group_size`` rows, g groups of ``in_group_size`` columns; a vector V has one entry per row and column
of its group. qdata: int8 up to eight bits, int16 above, ``(out / out_group_size, in / in_group_size, C)``, a code of b bits
being stored less 2^b from 2^(b - 1) on; codebooks: floating ``(C, 2^b, out_group_size, in_group_size)``; scale: floating
``(out / out_group_size, 1, 1, 1)``. As aqlm stores them (``codes``, ``codebooks``, ``scales``); the sum is rounded to the
dtype of the codebooks, as aqlm's is. Bit for bit, but for sums in bfloat16 that lie half-way between two numbers: these go to
even here, and on x86 away from zero there.

References:
    Egiazarian et al., Extreme Compression of Large Language Models via Additive Quantization, 2024, arXiv 2401.06118,
    section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.quant.blocks import matrix_shape
from funcpeft.quant.format import Format
from funcpeft.storage import Quantized


@dataclass(frozen=True, kw_only=True)
class Codebook(Format):
    """Additive codebooks: read, merged to a dense weight, not made from one.

    Args:
        num_codebooks: Number of vectors that a group is the sum of.
        nbits_per_codebook: Bits of a code, at most 16; a codebook has 2^bits vectors.
        in_group_size: Columns of a group.
        out_group_size: Rows of a group.
    """

    num_codebooks: int = 1
    nbits_per_codebook: int = 16
    in_group_size: int = 8
    out_group_size: int = 1

    decode_only: ClassVar[str] = "additive codebooks are found by beam search on calibration data"

    def __post_init__(self) -> None:
        for field in ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size"):
            value = getattr(self, field)
            ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
            self.require(ok, field, "a positive int", value)
        self.require(self.nbits_per_codebook <= 16, "nbits_per_codebook", "at most 16", self.nbits_per_codebook)

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        return (
            cls(nbits_per_codebook=10),
            cls(num_codebooks=2, nbits_per_codebook=8),
            cls(num_codebooks=3, nbits_per_codebook=5, in_group_size=4, out_group_size=2),
        )

    def misfit(self, shape: torch.Size) -> str | None:
        if len(shape) < 2:
            return "a weight with rows is required"
        rows, columns = matrix_shape(shape)
        if columns % self.in_group_size:
            return f"in_features must be a multiple of in_group_size {self.in_group_size}"
        return f"rows must be a multiple of out_group_size {self.out_group_size}" if rows % self.out_group_size else None

    def sample(self, weight: Tensor) -> Quantized:
        """Returns drawn codes and codebooks, with the weight's shape, dtype and size of rows, not its values."""
        rows, columns = matrix_shape(weight.shape)
        gen, half = rng.generator(0, self.label), 2 ** (self.nbits_per_codebook - 1)
        groups = (rows // self.out_group_size, columns // self.in_group_size, self.num_codebooks)
        codes = torch.randint(-half, half, groups, generator=gen)
        vectors = (self.num_codebooks, 2 * half, self.out_group_size, self.in_group_size)
        sizes = weight.detach().to(torch.float32).reshape(groups[0], -1).abs().mean(1)
        data = {
            "qdata": codes.to(torch.int8 if half <= 128 else torch.int16),
            "codebooks": rng.normal(vectors, gen),
            "scale": sizes.reshape(-1, 1, 1, 1),
        }
        return Quantized({n: t.to(weight.device) for n, t in data.items()}, self, weight.shape, weight.dtype)

    def decode(self, quantized: Quantized) -> Tensor:
        codes, codebooks = quantized.data["qdata"], quantized.data["codebooks"]
        tables, mask = codebooks.flatten(2).to(torch.float32), 2**self.nbits_per_codebook - 1
        total = _looked_up(tables[0], codes[..., 0], mask)
        for c in range(1, self.num_codebooks):
            total = total + _looked_up(tables[c], codes[..., c], mask)
        if self.num_codebooks > 1:
            total = total.to(codebooks.dtype).to(torch.float32)
        vectors = total.reshape(*codes.shape[:2], self.out_group_size, self.in_group_size)
        return (vectors * quantized.data["scale"].to(torch.float32)).transpose(1, 2)

    def step(self, quantized: Quantized) -> Tensor:
        raise errors.CannotRequantizeError(
            errors.say(self.label, "a cell of an additive codebook has no half-width", None, "merge to a dense weight")
        )


def _looked_up(table: Tensor, codes: Tensor, mask: int) -> Tensor:
    return table.index_select(0, (codes.to(torch.int64) & mask).reshape(-1))
