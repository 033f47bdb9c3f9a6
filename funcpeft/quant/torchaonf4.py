r"""TorchAONF4: NF4 with the levels of torchao's ``NF4Tensor``.

.. math:: \hat W_k = s_{\lfloor k / b \rfloor}\, c_{q_k}, \quad s = \max_{\text{block}} |W|

c: the levels of NF4 to four decimals, then in the dtype of the weight, up to 5e-5 (in float32) off those of bitsandbytes; all
else, tensors included, as in NF4. A reader of ``NF4Tensor`` computes the scales as that class does.

References:
    Dettmers et al., QLoRA, 2023, arXiv 2305.14314, section 3 (the data type); the rounded levels are torchao's definition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.quant.lookup import Lookup, pair_table
from funcpeft.quant.nf4 import LEVELS

_ROUNDED = torch.tensor([round(v, 4) for v in LEVELS], dtype=torch.float32, device="cpu")
_DTYPES = ("float32", "bfloat16", "float16")
_LEVELS: dict[str, tuple[float, ...]] = {d: tuple(_ROUNDED.to(getattr(torch, d)).tolist()) for d in _DTYPES}
_PAIRS = {name: pair_table(levels) for name, levels in _LEVELS.items()}


@dataclass(frozen=True, kw_only=True)
class TorchAONF4(Lookup):
    """NF4 with torchao's levels.

    Args:
        block_size: Number of consecutive entries of the flattened weight that share a scale; even.
        double_quant: Whether the scales are stored in eight bits too.
        precision: Name of the dtype in which the levels are stored: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    """

    precision: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.precision in _LEVELS, "precision", f"one of {errors.listed(_LEVELS)}", self.precision)

    @property
    def levels(self) -> tuple[float, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The level of every code."""
        return _LEVELS[self.precision]

    @property
    def pairs(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``pair_table(levels)``."""
        return _PAIRS[self.precision]
