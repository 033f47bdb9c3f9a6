"""BitNet: ternary layers as transformers has them, in memory and in checkpoints.

``weight`` uint8 ``(out / 4, in)``, four row blocks per byte, and ``weight_scale`` ``(1,)``, which divides in a
``BitLinear`` and multiplies in an ``AutoBitLinear`` of mode ``"offline"``; the latter holds its codes as floats -1, 0 and 1
once it is loaded. In mode ``"online"`` the layer keeps a floating weight and rounds it in every forward: the leaf is that
rounded weight. These layers also round their input to eight bits, which is no part of a weight and is left out. A layer
that normalises its input (``use_rms_norm``) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.errors import CheckpointError
from funcpeft.interop.libraries import gptq
from funcpeft.interop.library import FLOATS, Library, Taken, Tensors
from funcpeft.quant.ternary import Ternary
from funcpeft.storage import Quantized

_CLASSES = {"bitlinear": True, "autobitlinear": False}
_MODES = ("offline", "online")
_SOURCE = "transformers.integrations.bitnet"


@dataclass(frozen=True)
class BitNet(Library):
    """Reader and writer of BitNet."""

    name: ClassVar[str] = "bitnet"
    quant_methods: ClassVar[tuple[str, ...]] = ("bitnet",)
    layer_types: ClassVar[tuple[tuple[str, str], ...]] = ((_SOURCE, "BitLinear"), (_SOURCE, "AutoBitLinear"))

    def take(self, layer: Any, path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Taken:
        if layer.rms_norm is not None:
            raise gptq.unready(self, path, "a layer that normalises its input", "use a model without use_rms_norm")
        shape = torch.Size((layer.out_features, layer.in_features))
        if layer.weight.dtype == torch.uint8:
            return Taken(self._leaf(gptq.held(layer), path, shape, dtype, True), gptq.bias_of(layer))
        if layer.online_quant:
            return Taken(Ternary().requant(layer.weight.detach()), gptq.bias_of(layer))
        return Taken(self._unpacked(gptq.held(layer), path, shape, layer.weight.dtype), gptq.bias_of(layer))

    def read(
        self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, config: Mapping[str, Any], metadata: Any
    ) -> Quantized | None:
        where = f"{self.name} at {path!r}"
        if config.get("use_rms_norm"):
            rule, found = "layers that meet their input as it is are required", "use_rms_norm"
            raise CheckpointError(errors.say(where, rule, found))
        kind, mode = config.get("linear_class", "bitlinear"), config.get("quantization_mode", "offline")
        if kind not in _CLASSES:
            raise CheckpointError(errors.one_of(where, "linear_class", kind, _CLASSES))
        if mode not in _MODES:
            raise CheckpointError(errors.one_of(where, "quantization_mode", mode, _MODES))
        if kind == "autobitlinear" and mode == "online":
            return self._rounded(tensors, path, shape, dtype, config)
        if "weight_scale" not in tensors and not gptq.is_coded(tensors):
            return None
        if kind == "autobitlinear" and "weight" in tensors and tensors["weight"].is_floating_point():
            return self._unpacked(tensors, path, shape, dtype)
        return self._leaf(tensors, path, shape, dtype, _CLASSES[kind])

    def _rounded(
        self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, config: Mapping[str, Any]
    ) -> Quantized | None:
        """Rounds a floating weight as a layer of mode ``"online"`` does; ``None`` for a layer that is kept."""
        from transformers.quantizers.quantizers_utils import should_convert_module

        kept = config.get("modules_to_not_convert")
        if not should_convert_module(path, ["lm_head"] if kept is None else kept):
            return None
        weight = self.pick(tensors, path, "weight", tuple(shape), FLOATS)
        return Ternary().requant(weight.to(dtype))

    def _leaf(self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, inverse: bool) -> Quantized:
        out, in_ = shape
        where = f"{self.name} at {path!r}"
        if out % 4 or not shape.numel():
            raise CheckpointError(errors.say(where, "out_features must be a multiple of 4", tuple(shape)))
        codes = self.pick(tensors, path, "weight", (out // 4, in_), (torch.uint8,))
        if bool((codes & (codes >> 1) & 0b01010101).any()):
            raise CheckpointError(errors.say(where, "'weight' must hold codes 0, 1 and 2", 3))
        number = {"inverse_scale" if inverse else "scale": self._scale(tensors, path)}
        return Quantized({"qdata": codes.contiguous(), **number}, Ternary(inverse=inverse), shape, dtype)

    def _scale(self, tensors: Tensors, path: str) -> Tensor:
        scale = self.pick(tensors, path, "weight_scale", None, FLOATS)
        where = f"{self.name} at {path!r}"
        if scale.numel() != 1:
            raise CheckpointError(errors.say(where, "'weight_scale' must have one entry", tuple(scale.shape)))
        if not bool(scale != 0):
            raise CheckpointError(errors.say(where, "'weight_scale' must not be 0", 0))
        return scale.reshape(())

    def _unpacked(self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype) -> Quantized:
        """Reads codes that are stored as floats."""
        codes, scale = self.pick(tensors, path, "weight", tuple(shape), FLOATS), self._scale(tensors, path)
        if not bool((codes.abs() <= 1).logical_and(codes == codes.round()).all()):
            found = float(codes.abs().max())
            raise CheckpointError(errors.say(f"{self.name} at {path!r}", "'weight' must be -1, 0 and 1", f"up to {found:.4g}"))
        units = Quantized({"qdata": codes, "scale": torch.ones_like(scale)}, Ternary(inverse=False), shape, dtype)
        packed = Ternary(inverse=False).requant(codes, like=units)
        return replace(packed, data={**packed.data, "scale": scale})

    def refuses(self, quantized: Quantized) -> str | None:
        if not isinstance(quantized.format, Ternary):
            return f"bitnet stores Ternary, not {quantized.format!r}"
        if len(quantized.shape) != 2 or quantized.shape[0] % 4:
            return f"bitnet stores matrices of 4k rows, not shape {tuple(quantized.shape)}"
        return None

    def write(self, quantized: Quantized, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        data = quantized.data
        scale = data["inverse_scale" if quantized.format.inverse else "scale"]
        return {"weight": data["qdata"], "weight_scale": scale.reshape(1)}, {}

    def config(self, stored: Mapping[str, Quantized], dense: tuple[str, ...]) -> dict[str, Any]:
        inverse = self.same(stored, lambda q: q.format.inverse)
        return {
            "quant_method": "bitnet",
            "linear_class": "bitlinear" if inverse else "autobitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": list(dense),
        }
