r"""NF4: four bits at the quantiles of a normal distribution, one absmax scale per block.

.. math:: \hat W_k = s_{\lfloor k / b \rfloor}\, c_{q_k}, \quad s = \max_{\text{block}} |W|

c: the 16 levels, ascending from -1 to 1 with an exact 0; b: block size, counted along the flattened weight. qdata: uint8
``(ceil(n / 2),)``, two codes a byte, the earlier entry in the high half; scale: float32 ``(ceil(n / b),)``. With
``double_quant``: scale uint8 ``(ceil(n / b),)``, nested_scale float32 ``(ceil(n / b / 256),)``, offset float32 ``()``. As
bitsandbytes stores it, bit for bit; its AVX512 kernel (0.50) decodes wrongly where a row is even and no multiple of b.

References:
    Dettmers et al., QLoRA, 2023, arXiv 2305.14314, section 3 and appendix E (the levels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from funcpeft.quant.lookup import Lookup, pair_table

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NF4(Lookup):
    """Blockwise 4-bit NormalFloat.

    Args:
        block_size: Number of consecutive entries of the flattened weight that share a scale; even.
        double_quant: Whether the scales are stored in eight bits too.
    """

    levels: ClassVar[tuple[float, ...]] = LEVELS
    kernel: ClassVar[str] = "nf4"
    pairs: ClassVar[Tensor] = pair_table(LEVELS)
