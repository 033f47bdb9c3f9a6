"""The contract of a quantization format: a pure pair, and the half-width of its cells.

A format is a frozen dataclass with ``requant(weight) -> Quantized``, ``dequant(quantized) -> weight`` and ``step(quantized)``.
Both directions compute in float32 with float32 scales, whatever the weight's dtype. Imports weights, errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.tree import all_finite
from funcpeft.weights import Quantized


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a weight is stored as codes and scales."""

    def requant(self, weight: Tensor) -> Quantized:
        """Encodes a floating weight.

        Raises:
            TypeError: If the weight is not floating.
            ValueError: If its shape does not fit the format, or it is not finite.
        """
        if not weight.is_floating_point():
            raise TypeError(errors.say(self.label, "a floating weight is required", weight.dtype))
        reason = self.misfit(weight.shape)
        if reason:
            raise ValueError(errors.say(self.label, reason, tuple(weight.shape), "leave the weight dense"))
        if not all_finite(weight):
            raise ValueError(errors.say(self.label, "a finite weight is required", "NaN or infinity"))
        return Quantized(self.encode(weight.detach().to(torch.float32)), self, weight.shape, weight.dtype)

    def dequant(self, quantized: Quantized) -> Tensor:
        """Decodes to the weight's shape and dtype."""
        return self.decode(quantized).to(quantized.dtype)

    @property
    def label(self) -> str:
        """Name of the format in messages."""
        return type(self).__name__.lower()

    def misfit(self, shape: torch.Size) -> str | None:
        """Says what the format requires of a shape that does not fit it, or ``None`` if it fits."""
        return None

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns the tensors that store a float32 weight."""
        raise TypeError(f"{self.label}: a format must define encode.")

    def decode(self, quantized: Quantized) -> Tensor:
        """Returns the float32 weight."""
        raise TypeError(f"{self.label}: a format must define decode.")

    def step(self, quantized: Quantized) -> Tensor:
        """Returns, per entry of the weight, the half-width of its cell: the largest rounding error."""
        raise TypeError(f"{self.label}: a format must define step.")
