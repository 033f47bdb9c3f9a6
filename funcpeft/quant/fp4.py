r"""FP4: four-bit floats as bitsandbytes defines them, one absmax scale per block.

.. math:: \hat W_k = s_{\lfloor k / b \rfloor}\, c_{q_k}, \quad s = \max_{\text{block}} |W|

c: sign and one of the eight magnitudes 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1, in the order of the code's bits (not
ascending). Tensors as in NF4. This is not the e2m1 of NVFP4 and MXFP4.

References:
    Dettmers et al., QLoRA, 2023, arXiv 2305.14314, section 5 (compared with NF4); the levels are bitsandbytes' definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from funcpeft.quant.lookup import Lookup, pair_table

_MAGNITUDES = (0.0, 0.0052083333, 0.6666666667, 1.0, 0.3333333333, 0.5, 0.1666666667, 0.25)
_LEVELS = (*_MAGNITUDES, *(-m for m in _MAGNITUDES))


@dataclass(frozen=True, kw_only=True)
class FP4(Lookup):
    """Blockwise 4-bit floats.

    Args:
        block_size: Number of consecutive entries of the flattened weight that share a scale; even.
        double_quant: Whether the scales are stored in eight bits too.
    """

    levels: ClassVar[tuple[float, ...]] = _LEVELS
    kernel: ClassVar[str] = "fp4"
    pairs: ClassVar[Tensor] = pair_table(_LEVELS)
