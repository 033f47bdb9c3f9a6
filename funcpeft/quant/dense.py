r"""Dense: the identity pair, a weight in a floating dtype of its own.

.. math:: \hat W = \operatorname{round}_{d}(W)

qdata: the weight in dtype d. What a mixed tree has where a weight stays as it is but for its dtype.

References:
    IEEE 754-2019, section 4.3 (rounding to nearest, ties to even).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcpeft.quant.format import Data, Format
from funcpeft.storage import Quantized

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Dense(Format):
    """A plain tensor.

    Args:
        storage: dtype in which the weight is kept: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    """

    storage: str = "bfloat16"

    def __post_init__(self) -> None:
        self.require(self.storage in _DTYPES, "storage", f"one of {_DTYPES}", self.storage)

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        return tuple(cls(storage=d) for d in _DTYPES)

    def encode(self, weight: Tensor) -> Data:
        return {"qdata": weight.to(getattr(torch, self.storage), copy=True)}

    def encode_like(self, weight: Tensor, like: Quantized) -> Data:
        return self.encode(weight)

    def decode(self, quantized: Quantized) -> Tensor:
        return quantized.data["qdata"].to(torch.float32, copy=True)

    def step(self, quantized: Quantized) -> Tensor:
        kind = torch.finfo(getattr(torch, self.storage))
        size = quantized.data["qdata"].to(torch.float32).abs()
        return (size * kind.eps / 2 + kind.smallest_normal * kind.eps).reshape(quantized.shape)
