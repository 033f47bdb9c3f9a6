"""HQQ: ``HQQLinear`` in memory.

A layer holds the packed codes as its parameter ``W_q``, and in the dict ``meta`` ``scale`` and ``zero`` with the options:
``nbits``, ``axis`` 1 (groups of neighbours in the flat weight, :math:`(n / g, g)`) or 0 (columns of :math:`(g, n / g)`),
``packing``, and ``view_as_float`` where the bytes of the codes are kept in a floating dtype. Weight = (code - zero) * scale, in
``compute_dtype``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from funcpeft import errors
from funcpeft.interop.library import Library, Taken
from funcpeft.quant.affineint import AffineInt
from funcpeft.storage import Quantized

#: Bits of a code in every packing; 1.58 bits (three levels) are stored as two, and 5 and 6 as bytes.
_BITS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}


@dataclass(frozen=True)
class HQQ(Library):
    """Reader of HQQ's layers."""

    name: ClassVar[str] = "hqq"
    layer_types: ClassVar[tuple[tuple[str, str], ...]] = (
        ("hqq.", "HQQLinear"),
        ("hqq.backends.", "HQQLinearBitBlas"),
        ("hqq.backends.", "HQQLinearTorchWeightOnlynt4"),
        ("hqq.backends.", "MarlinLinear"),
    )

    def take(self, layer: Any, path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Taken:
        where = f"hqq at {path!r}"
        kind = type(layer).__name__
        if type(layer).__module__.startswith("hqq.backends."):
            remedy = "take the model before prepare_for_inference"
            raise ValueError(errors.say(where, "codes in HQQ's own packing are required", f"a kernel's {kind}", remedy))
        if layer.W_q is None:
            raise ValueError(errors.say(where, "a quantized weight is required", "none", "call the layer's initialize() first"))
        _require_plain(layer.meta, where)
        return Taken(_weight(layer.W_q.detach(), layer.meta), None if layer.bias is None else layer.bias.detach())

    def refuses(self, quantized: Quantized) -> str | None:
        return "transformers does not load HQQ's checkpoints"


def _require_plain(meta: Mapping[str, Any], where: str) -> None:
    """Raises ``ValueError`` unless scale and zero lie in ``meta`` as numbers, and the packing is known."""
    if meta.get("quant_scale") or meta.get("quant_zero"):
        remedy = "quantize with quant_scale=False and quant_zero=False"
        raise ValueError(errors.say(where, "scale and zero must be stored as numbers", "quantized ones", remedy))
    if "scale" not in meta or "zero" not in meta:
        raise ValueError(errors.say(where, "scale and zero must be in meta", sorted(meta), "quantize with offload_meta=False"))
    if meta["packing"] not in _BITS:
        remedy = "quantize with bitpack=True"
        rule, found = f"packing must be one of {errors.listed(_BITS)}", repr(meta["packing"])
        raise ValueError(errors.say(where, rule, found, remedy))


def _weight(codes: torch.Tensor, meta: Mapping[str, Any]) -> Quantized:
    shape, scale, zero = torch.Size(meta["shape"]), meta["scale"].detach(), meta["zero"].detach()
    if meta["view_as_float"]:
        codes = codes.view(meta["unpack_view_dtype"])
    # codes and zero meet in the wider dtype of the two
    zero = zero.to(torch.promote_types(meta.get("compute_dtype", torch.float16), zero.dtype))
    bits = _BITS[meta["packing"]] if meta["nbits"] not in (5, 6) else meta["nbits"]
    options: dict[str, Any] = {"bits": bits, "symmetric": False, "packing": "hqq" if bits not in (5, 6) else "bytes"}
    if scale.ndim == 0:  # one scale for all: the matrix itself is packed
        fmt, table = AffineInt(block_size="tensor", **options), (1, 1)
    else:
        layout, table = ("flat", (-1, 1)) if meta["axis"] == 1 else ("strided", (1, -1))
        fmt = AffineInt(block_size=meta["group_size"], layout=layout, **options)
    data = {"qdata": codes.contiguous(), "scale": scale.reshape(table), "zero_point": zero.reshape(table)}
    return Quantized(data, fmt, shape, torch.promote_types(zero.dtype, scale.dtype))
