"""bitsandbytes: ``Linear4bit`` and ``Linear8bitLt``, in memory and in checkpoints.

Four bits: ``weight`` uint8 ``(ceil(n / 2), 1)`` in any dtype's view of the same bytes, ``weight.absmax``,
``weight.quant_map``, with double quantization ``weight.nested_absmax`` and ``weight.nested_quant_map``, and the rest as JSON
in a uint8 tensor ``weight.quant_state.bitsandbytes__nf4``. Eight bits: ``weight`` int8 ``(out, in)``, ``SCB`` float32
``(out,)``. The library's layers rewrite their weight in an eval forward on some CPUs; such a layer is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.errors import CheckpointError
from funcpeft.interop.library import FLOATS, Library, Taken, Tensors, copied
from funcpeft.quant.fp4 import FP4
from funcpeft.quant.int8 import Int8
from funcpeft.quant.lookup import NESTED, Lookup, dynamic_levels
from funcpeft.quant.nf4 import NF4
from funcpeft.storage import Quantized

_FORMATS: dict[str, type[Lookup]] = {"nf4": NF4, "fp4": FP4}
_STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class BitsAndBytes(Library):
    """Reader and writer of bitsandbytes."""

    name: ClassVar[str] = "bitsandbytes"
    quant_methods: ClassVar[tuple[str, ...]] = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
    layer_types: ClassVar[tuple[tuple[str, str], ...]] = (("bitsandbytes.", "Linear4bit"), ("bitsandbytes.", "Linear8bitLt"))

    def take(self, layer: Any, path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Taken:
        bias = None if layer.bias is None else copied(layer.bias)
        if hasattr(layer, "state"):  # Linear8bitLt
            return Taken(_eight_bit(layer, path, dtype), bias)
        state = getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
        if state is None:
            raise _unready(path, "its weight is not quantized yet", "move the layer to its device first")
        if getattr(state, "packing_format_for_cpu", False):
            remedy = "take it before the first forward, or from the file"
            raise _unready(path, "an eval forward has repacked its weight", remedy)
        data = {"qdata": copied(layer.weight.data.view(torch.uint8).reshape(-1)), "scale": copied(state.absmax)}
        if state.nested:
            nested = {"nested_scale": copied(state.state2.absmax), "offset": copied(state.offset).reshape(())}
            data |= nested
        fmt = _FORMATS[state.quant_type](block_size=state.blocksize, double_quant=state.nested)
        return Taken(Quantized(data, fmt, torch.Size(state.shape), state.dtype), bias)

    def read(
        self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, config: Mapping[str, Any], metadata: Any
    ) -> Quantized | None:
        if "SCB" in tensors:
            codes = self.pick(tensors, path, "weight", tuple(shape), (torch.int8,))
            scale = self.pick(tensors, path, "SCB", (shape[0],), FLOATS)
            return Quantized({"qdata": codes, "scale": scale.to(torch.float32)}, Int8(), shape, dtype)
        states = [n for n in tensors if n.startswith(_STATE)]
        return self._read_four(tensors, path, shape, states[0]) if states else None

    def _read_four(self, tensors: Tensors, path: str, shape: torch.Size, key: str) -> Quantized:
        state = _state(tensors[key], path)
        if tuple(state["shape"]) != tuple(shape):
            raise CheckpointError(
                errors.say(f"bitsandbytes at {path!r}", f"the shape must be {tuple(shape)}", tuple(state["shape"]))
            )
        nested = "nested_blocksize" in state
        fmt = _FORMATS[state["quant_type"]](block_size=state["blocksize"], double_quant=nested)
        blocks = -(-shape.numel() // state["blocksize"])
        kind = (torch.uint8,) if nested else (torch.float32,)
        packed = self.pick(tensors, path, "weight").view(torch.uint8).reshape(-1)
        data = {
            "qdata": packed[: (shape.numel() + 1) // 2],
            "scale": self.pick(tensors, path, "weight.absmax", (blocks,), kind),
        }
        if len(data["qdata"]) != (shape.numel() + 1) // 2:
            rule = f"{shape.numel()} codes are required"
            raise CheckpointError(errors.say(f"bitsandbytes at {path!r}", rule, 2 * len(packed)))
        self._require_map(tensors, path, "weight.quant_map", torch.tensor(fmt.levels))
        if nested:
            self._require_map(tensors, path, "weight.nested_quant_map", dynamic_levels())
            groups = -(-blocks // NESTED)
            data["nested_scale"] = self.pick(tensors, path, "weight.nested_absmax", (groups,), (torch.float32,))
            data["offset"] = torch.tensor(state["nested_offset"], dtype=torch.float32)
        return Quantized(data, fmt, shape, getattr(torch, state["dtype"]))

    def _require_map(self, tensors: Tensors, path: str, name: str, levels: Tensor) -> None:
        found = self.pick(tensors, path, name, tuple(levels.shape)).to(torch.float32)
        if not torch.allclose(found, levels.to(torch.float32), rtol=1e-5, atol=1e-6):
            raise CheckpointError(errors.say(f"bitsandbytes at {path!r}", f"{name!r} must hold the format's levels", "others"))

    def refuses(self, quantized: Quantized) -> str | None:
        if not isinstance(quantized.format, NF4 | FP4 | Int8):
            return f"bitsandbytes stores nf4, fp4 and int8, not {quantized.format!r}"
        return None if len(quantized.shape) == 2 else f"bitsandbytes stores matrices, not shape {tuple(quantized.shape)}"

    def write(self, quantized: Quantized, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        data, fmt = quantized.data, quantized.format
        if isinstance(fmt, Int8):
            tensors = {"weight": data["qdata"], "SCB": data["scale"], "weight_format": torch.tensor(0, dtype=torch.uint8)}
            return tensors, {}
        kind = fmt.label
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": fmt.block_size,
            "dtype": str(quantized.dtype).removeprefix("torch."),
            "shape": list(quantized.shape),
        }
        tensors = {
            "weight": data["qdata"][:, None],
            "weight.absmax": data["scale"],
            "weight.quant_map": torch.tensor(fmt.levels, dtype=torch.float32),
        }
        if fmt.double_quant:
            state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": float(data["offset"])}
            tensors |= {"weight.nested_absmax": data["nested_scale"], "weight.nested_quant_map": dynamic_levels()}
        tensors[_STATE + kind] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return tensors, {}

    def config(self, stored: Mapping[str, Quantized], dense: tuple[str, ...]) -> dict[str, Any]:
        four = self.same(stored, lambda q: isinstance(q.format, Lookup))
        made: dict[str, Any] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "llm_int8_skip_modules": list(dense),
            "llm_int8_threshold": 6.0,
            "bnb_4bit_quant_storage": "uint8",
        }
        if four:
            kind, double, dtype = self.same(stored, lambda q: (q.format.label, q.format.double_quant, q.dtype))
            made |= {
                "bnb_4bit_quant_type": kind,
                "bnb_4bit_use_double_quant": double,
                "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            }
        return made


def _eight_bit(layer: Any, path: str, dtype: torch.dtype) -> Quantized:
    weight = layer.weight
    codes = weight.data if weight.data.dtype == torch.int8 else None
    scale = getattr(weight, "SCB", None)
    if scale is None:  # the first forward moves it
        scale = getattr(layer.state, "SCB", None)
    if codes is None or scale is None:
        raise _unready(path, "its weight is not quantized yet", "move the layer to its device first")
    dtype = dtype if layer.bias is None else layer.bias.dtype
    return Quantized({"qdata": copied(codes), "scale": copied(scale, torch.float32)}, Int8(), codes.shape, dtype)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


#: What the fields of a ``quant_state`` must be.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "quant_type": (lambda v: isinstance(v, str) and v in _FORMATS, f"one of {errors.listed(_FORMATS)}"),
    "blocksize": (lambda v: _is_count(v) and v % 2 == 0, "even and positive"),
    "dtype": (lambda v: v in ("float32", "bfloat16", "float16", "float64"), "a floating dtype"),
    "shape": (lambda v: isinstance(v, list) and all(map(_is_count, v)), "a list of positive ints"),
}
_NESTED_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "nested_blocksize": (lambda v: v == NESTED, str(NESTED)),
    "nested_offset": (lambda v: isinstance(v, float | int) and math.isfinite(v), "a finite number"),
}


def _state(t: Tensor, path: str) -> dict[str, Any]:
    """Reads the JSON that describes a four-bit weight.

    Raises:
        CheckpointError: If it is not JSON, or a field is missing or unknown.
    """
    where = f"bitsandbytes at {path!r}"
    try:
        state = json.loads(bytes(t.to(torch.uint8).tolist()))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(errors.say(where, "the quant_state must be JSON", f"{type(e).__name__}: {e}")) from e
    if not isinstance(state, dict):
        raise CheckpointError(errors.say(where, "the quant_state must be an object", type(state).__name__))
    nested = _NESTED_FIELDS if "nested_blocksize" in state else {}
    for field, (fits, rule) in {**_FIELDS, **nested}.items():
        if not fits(state.get(field)):
            raise CheckpointError(errors.say(where, f"{field!r} in the quant_state must be {rule}", repr(state.get(field))))
    return state


def _unready(path: str, found: str, remedy: str) -> ValueError:
    rule = "a layer with its weight as quantized is required"
    return ValueError(errors.say(f"bitsandbytes at {path!r}", rule, found, remedy))
