"""The contract of a quantization format: read this first of ``quant/``.

A format is a frozen dataclass, its fields the options of the storage. ``requant(weight) -> Quantized`` and
``dequant(quantized) -> weight`` are pure; ``step(quantized)`` bounds the error of each entry. To write one: subclass
``Format``, give ``encode``, ``encode_like``, ``decode`` and ``step`` on matrices in float32, say in ``misfit`` which shapes it
refuses, and hand an instance to ``funcpeft.testing.check_format``. A format never imports the library whose storage it is;
NF4 and FP4 call bitsandbytes' kernel where that is loaded already and gives the same bits. Imports storage, blocks, tree,
errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.quant.blocks import matrix_shape
from funcpeft.storage import SLOTS, Quantized
from funcpeft.tree import all_finite

Data = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a weight is stored as codes and scales."""

    #: Why a weight cannot be stored from its values alone; ``""`` if it can.
    decode_only: ClassVar[str] = ""
    #: The fraction of entries that a refit may leave beyond the grid.
    clips: ClassVar[float] = 0.0
    #: Whether decoding and refitting gives the same bits again; if not, rounds of it drift and only ``like=`` is stable.
    refits_exactly: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        torch.serialization.add_safe_globals([cls])  # plain values alone, so torch.load may make one

    def requant(self, weight: Tensor, like: Quantized | None = None) -> Quantized:
        """Stores a floating weight.

        Args:
            weight: The weight, of any floating dtype; not changed.
            like: A stored weight of this format and shape whose grid (scales, zeros) is kept: every entry gets the code of
                its nearest point, so storing again what ``like`` decodes to gives its codes. Without it the grid is fitted
                anew.

        Raises:
            CannotRequantizeError: If the format needs more than the weight; the message names the alternatives.
            TypeError: If the weight is not floating, or ``like`` is of another format.
            ValueError: If its shape does not fit the format, or it is not finite.
        """
        if self.decode_only:
            raise errors.CannotRequantizeError(
                errors.say(self.label, f"cannot be made from a weight: {self.decode_only}", None, _ALTERNATIVES)
            )
        if not weight.is_floating_point():
            raise TypeError(errors.say(self.label, "a floating weight is required", weight.dtype))
        self._require_fit(weight.shape, like)
        matrix = weight.detach().to(torch.float32).reshape(matrix_shape(weight.shape))
        if not all_finite(matrix):
            raise ValueError(errors.say(self.label, "a weight that is finite in float32 is required", "NaN or infinity"))
        data = self.encode(matrix) if like is None else self.encode_like(matrix, like)
        if not all(all_finite(t) for t in data.values() if t.dtype in _WIDE):
            raise ValueError(errors.say(self.label, "a weight within the format's range is required", "a larger one"))
        assert len(data) <= SLOTS
        return Quantized(data, self, weight.shape, weight.dtype if like is None else like.dtype)

    def _require_fit(self, shape: torch.Size, like: Quantized | None) -> None:
        if like is None:
            reason = self.misfit(shape)
            if reason:
                raise ValueError(errors.say(self.label, reason, tuple(shape), "leave the weight dense"))
        elif like.format != self:
            raise TypeError(errors.say(self.label, f"like must be stored as {self}", like.format))
        elif like.shape != shape:
            raise ValueError(errors.say(self.label, f"the weight must have like's shape {tuple(like.shape)}", tuple(shape)))

    def dequant(self, quantized: Quantized) -> Tensor:
        """Decodes to the weight's shape and dtype."""
        return self.decode(quantized).reshape(quantized.shape).to(quantized.dtype)

    def fits(self, shape: torch.Size | tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be stored."""
        return self.misfit(torch.Size(shape)) is None

    def clipped(self, weight: Tensor, quantized: Quantized) -> Tensor:
        """Returns the fraction of entries beyond the grid: those stored with an error larger than ``step``."""
        error = (weight.to(torch.float64) - self.decode(quantized).reshape(weight.shape).to(torch.float64)).abs()
        slack = 4 * torch.finfo(torch.float32).eps * weight.abs().to(torch.float64)  # codes are found in float32
        return (error > self.step(quantized).to(torch.float64) + slack).to(torch.float64).mean()

    def __str__(self) -> str:
        """Returns the constructor with the fields that are not at their defaults."""
        given = [f"{f.name}={v!r}" for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default]
        return f"{type(self).__name__}({', '.join(given)})"

    @property
    def label(self) -> str:
        """Name of the format in messages."""
        return type(self).__name__.lower()

    # -- what a format gives -------------------------------------------------------------------------------------------

    def misfit(self, shape: torch.Size) -> str | None:
        """Says what the format requires of a shape that does not fit it, or ``None`` if it fits."""
        return None

    def encode(self, weight: Tensor) -> Data:
        """Returns the tensors that store a float32 matrix, at most six, the codes under ``qdata``."""
        raise TypeError(f"{self.label}: a format must define encode.")

    def encode_like(self, weight: Tensor, like: Quantized) -> Data:
        """Returns the tensors that store a float32 matrix on the grid of ``like``."""
        raise TypeError(f"{self.label}: a format must define encode_like.")

    def decode(self, quantized: Quantized) -> Tensor:
        """Returns the float32 weight, in any shape of the same row-major order.

        Plain torch operations on ``quantized.data`` without a look at values, so that it maps over stacked leaves, traces and
        differentiates with respect to scales; sizes come from ``quantized.shape``.
        """
        raise TypeError(f"{self.label}: a format must define decode.")

    def step(self, quantized: Quantized) -> Tensor:
        """Returns, per entry of the weight and in its shape, the half-width of its cell: the largest error unless clipped."""
        raise TypeError(f"{self.label}: a format must define step.")

    def grid(self, quantized: Quantized) -> tuple[Tensor, Tensor]:
        """Returns scales and zero points of an affine grid, ``(rows, groups)`` each: weight = (code - zero) * scale.

        Raises:
            TypeError: If the grid is not affine.
        """
        raise TypeError(errors.say(self.label, "an affine grid is required", None, "use Int8 or AffineInt"))

    def sample(self, weight: Tensor) -> Quantized:
        """Returns a stored weight of the given one's shape for the laws; a format that cannot be made of one draws codes."""
        return self.requant(weight)

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        """Returns instances, one per variant of the layout, on which the laws are checked."""
        return (cls(),)

    # -- as data -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-able values, with the format's name under ``"format"``."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"format": type(self).__name__, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Makes the format from ``to_dict``'s result; unknown fields are refused by name."""
        names = {f.name for f in dataclasses.fields(cls)}
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "format"}
        for name in given.keys() - names:
            raise TypeError(errors.say(cls.__name__, "fields must be known", repr(name), errors.nearest(name, names)))
        return cls(**given)

    def require(self, ok: bool, field: str, rule: str, found: object, remedy: str = "") -> None:
        """Raises ``ValueError`` naming the format and the field unless ``ok``."""
        if not ok:
            raise ValueError(errors.say(self.label, f"{field} must be {rule}", repr(found), remedy))


_WIDE = (torch.float32, torch.bfloat16, torch.float16)
_ALTERNATIVES = "keep the weight dense, or store it as NF4, Int8, AffineInt or FP8"
