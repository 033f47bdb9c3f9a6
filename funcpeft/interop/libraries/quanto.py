"""optimum-quanto: frozen ``QLinear`` layers in memory.

``weight`` is a tensor subclass: of eight bits (``qint8``, ``qfloat8``) with ``_data`` and ``_scale`` per row; of four and two
with ``_data`` packed by blocks of rows, ``_scale`` and ``_shift`` per row, or per group of neighbours in the flat weight. It is
code * scale - shift where the shift is floating, else (code - shift) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from funcpeft import errors
from funcpeft.interop.library import Library, Taken
from funcpeft.quant.affineint import AffineInt
from funcpeft.quant.fp8 import FP8
from funcpeft.storage import Quantized

_KINDS = {"qfloat8_e4m3fn": "e4m3", "qfloat8_e5m2": "e5m2"}


@dataclass(frozen=True)
class Quanto(Library):
    """Reader of optimum-quanto's layers."""

    name: ClassVar[str] = "quanto"
    layer_types: ClassVar[tuple[tuple[str, str], ...]] = (("optimum.quanto.", "QLinear"), ("optimum.quanto.", "QConv2d"))

    def take(self, layer: Any, path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Taken:
        where = f"quanto at {path!r}"
        if not isinstance(layer, torch.nn.Linear):
            remedy = "exclude it when quantizing"
            raise ValueError(errors.say(where, "a QLinear is required", type(layer).__name__, remedy))
        active: Any = layer.activation_qtype
        if active is not None:
            remedy = "a leaf is a weight alone, so quantize the weights only"
            raise ValueError(errors.say(where, "inputs must be met as they are", f"activations={active.name}", remedy))
        if not layer.frozen:
            found, remedy = "one that is quantized at every call", "call optimum.quanto.freeze(model) first"
            raise ValueError(errors.say(where, "a stored weight is required", found, remedy))
        return Taken(_weight(layer.weight, where), None if layer.bias is None else layer.bias.detach())

    def refuses(self, quantized: Quantized) -> str | None:
        return "transformers does not save quanto's weights"


def _weight(w: Any, where: str) -> Quantized:
    if w.axis not in (0, None):
        raise ValueError(errors.say(where, "the weight must be quantized by rows", f"axis {w.axis}", "quantize with axis=0"))
    if w.qtype.bits < 8:
        return _few_bits(w)
    if type(w).__name__ != "WeightQBytesTensor":  # reordered for a kernel of CUDA
        w = w.weight_qbytes_tensor()
    codes, scale = w._data.detach().contiguous(), w._scale.detach()
    block, table = ("tensor", (1, 1)) if scale.numel() == 1 else ("row", (-1, 1))
    scale = scale.reshape(table)
    if w.qtype.name == "qint8":
        fmt: Any = AffineInt(bits=8, block_size=block, packing="int8")
    elif w.qtype.name in _KINDS:
        fmt, scale = FP8(block_size=block, kind=_KINDS[w.qtype.name]), scale.to(torch.float32)
    else:
        raise ValueError(
            errors.say(where, "weights must be qint8, qint4, qint2 or qfloat8", w.qtype.name, "quantize with one of these")
        )
    return Quantized({"qdata": codes, "scale": scale}, fmt, torch.Size(w.shape), w.dtype)


def _few_bits(w: Any) -> Quantized:
    if type(w).__name__ != "WeightQBitsTensor":  # reordered for a kernel (bfloat16 in groups of 128)
        w = w.weight_qbits_tensor()
    scale, shift = w._scale.detach().reshape(-1, 1), w._shift.detach().reshape(-1, 1)
    grid: Any = {"block_size": "row"} if w._group_size is None else {"block_size": w._group_size, "layout": "flat"}
    fmt = AffineInt(bits=w.qtype.bits, symmetric=False, packing="quanto", **grid)
    data = {"qdata": w._data._data.detach().contiguous(), "scale": scale}
    data |= {"shift": shift} if shift.is_floating_point() else {"zero_point": shift.to(torch.uint8)}
    return Quantized(data, fmt, torch.Size(w.shape), w.dtype)
