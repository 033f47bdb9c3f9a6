"""AWQ: ``qweight``, ``qzeros`` and ``scales`` of version ``"gemm"``, in checkpoints and in gptqmodel's layers.

With g inputs per group and G = ceil(in / g) groups: ``qweight`` int32 ``(in, out / 8)`` and ``qzeros`` int32 ``(G, out /
8)``, eight outputs per word, those of even number in its lower half; ``scales`` floats ``(G, out)``. Four bits. The factors
by which AWQ scales channels are in the checkpoint's other weights already, so the decoded weight is all there is to a
layer. The layers for CPUs rewrite their weight in an eval forward; such a layer is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.errors import CheckpointError
from funcpeft.interop.libraries import gptq
from funcpeft.interop.library import FLOATS, Library, Taken, Tensors
from funcpeft.quant.affineint import AffineInt
from funcpeft.quant.packing import PACKINGS
from funcpeft.storage import Quantized

_PACKING = PACKINGS["awq"]


@dataclass(frozen=True)
class AWQ(Library):
    """Reader and writer of AWQ."""

    name: ClassVar[str] = "awq"
    quant_methods: ClassVar[tuple[str, ...]] = ("awq",)
    layer_types: ClassVar[tuple[tuple[str, str], ...]] = (("gptqmodel.", "AWQuantLinear"),)

    def take(self, layer: Any, path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Taken:
        gptq.require_stored(self, layer, path)
        shape, where = torch.Size((layer.out_features, layer.in_features)), f"{self.name} at {path!r}"
        _, size = gptq.bits_and_size({"bits": layer.bits, "group_size": layer.group_size}, where, (4,))
        return Taken(self._leaf(gptq.held(layer), path, shape, dtype, size), gptq.bias_of(layer))

    def read(
        self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, config: Mapping[str, Any], metadata: Any
    ) -> Quantized | None:
        if not any(name in tensors for name in ("qweight", "qzeros", "scales")):
            return None
        where = f"{self.name} at {path!r}"
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise CheckpointError(errors.one_of(where, "version", version, ["gemm"]))
        _, size = gptq.bits_and_size(config, where, (4,))
        return self._leaf(tensors, path, shape, dtype, size)

    def _leaf(self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, size: int) -> Quantized:
        out, in_ = shape
        fmt = AffineInt(block_size="row" if size in (-1, in_) else size, packing="awq")
        self.require_fit(fmt, path, shape)
        groups = 1 if size == -1 else -(-in_ // size)
        codes = self.pick(tensors, path, "qweight", (in_, out // 8), (torch.int32,))
        stored = self.pick(tensors, path, "qzeros", (groups, out // 8), (torch.int32,))
        scale = self.pick(tensors, path, "scales", (groups, out), FLOATS)
        data = {"qdata": codes.contiguous(), "scale": gptq.transposed(scale)}
        return gptq.with_zeros(data, _PACKING.unpack(stored, 4, out, groups), fmt, shape, dtype)

    def refuses(self, quantized: Quantized) -> str | None:
        if "g_idx" in quantized.data:
            return "awq has groups of neighbours only, no act order"
        reason = gptq.unlike(quantized, "awq", self.name)
        zero = quantized.data.get("zero_point")
        if reason is None and zero is not None and bool((zero > 15).any()):
            return f"awq stores zeros of at most 15, not {int(zero.max())}"
        return reason

    def write(self, quantized: Quantized, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        data = quantized.data
        zeros = _PACKING.pack(gptq.zeros(quantized), 4)
        return {"qweight": data["qdata"], "qzeros": zeros, "scales": gptq.transposed(data["scale"])}, {}

    def config(self, stored: Mapping[str, Quantized], dense: tuple[str, ...]) -> dict[str, Any]:
        for path in stored:
            if path.rpartition(".")[2] == "lm_head":
                rule, remedy = "transformers never loads a stored head", "leave this one dense"
                raise ValueError(errors.say(f"{self.name} at {path!r}", rule, "a Quantized leaf", remedy))
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.same(stored, gptq.written_size),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(dense) or None,
        }
