"""torchao: linear layers whose weight is a tensor subclass, in memory and in the safetensors that transformers writes.

A layer stays an ``nn.Linear``; its ``weight`` is an ``Int8Tensor`` (int8 codes), an ``IntxUnpackedToInt8Tensor`` (1 to 8 bits,
a byte each), a ``Float8Tensor``, an ``NVFP4Tensor``, an ``MXTensor`` or an ``NF4Tensor``. A checkpoint has their tensors as
``_weight_qdata``, ``_weight_scale``, ``_weight_zero_point`` and ``_weight_per_tensor_scale``, and in the metadata of the file
the class of each weight and its options as JSON under ``<path>.weight``; ``tensor_names`` there is the JSON list of all
weights. Weights that quantize activations too, or whose layout is that of a kernel, are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from funcpeft import errors
from funcpeft.errors import CheckpointError
from funcpeft.interop.library import Library, Taken, Tensors
from funcpeft.quant.affineint import AffineInt
from funcpeft.quant.blocks import BlockSize
from funcpeft.quant.fp8 import FP8
from funcpeft.quant.int8 import Int8
from funcpeft.quant.mxfp4 import MXFP4
from funcpeft.quant.mxfp8 import MXFP8
from funcpeft.quant.nf4 import NF4
from funcpeft.quant.nvfp4 import NVFP4, swizzled, unswizzled
from funcpeft.quant.torchaonf4 import TorchAONF4
from funcpeft.storage import Quantized

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_INTEGERS = {f"int{bits}": bits for bits in range(1, 9)}
_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TorchAO(Library):
    """Reader and writer of torchao."""

    name: ClassVar[str] = "torchao"
    quant_methods: ClassVar[tuple[str, ...]] = ("torchao",)

    def owns(self, layer: nn.Module) -> bool:
        return any(_foreign(p) for p in layer.parameters(recurse=False))

    def take(self, layer: Any, path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Taken:
        where = f"torchao at {path!r}"
        held = [n for n, p in layer.named_parameters(recurse=False) if _foreign(p)]
        if not isinstance(layer, nn.Linear) or held != ["weight"]:
            found = f"{errors.listed(held)} of a {type(layer).__name__}"
            raise ValueError(errors.say(where, "the weight of a Linear is required", found, "leave the layer out of quantize_"))
        weight: Any = layer.weight
        kind = type(weight).__name__
        _require_readable(kind, where, ValueError)
        names, facts = weight.__tensor_flatten__()
        parts = {n: getattr(weight, n).detach() for n in names}
        facts = {**facts, "dtype": weight.dtype}
        stored = _read(_Found(kind, parts, facts, torch.Size(weight.shape), where, ValueError))
        return Taken(stored, None if layer.bias is None else layer.bias.detach())

    def read(
        self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, config: Mapping[str, Any], metadata: Any
    ) -> Quantized | None:
        parts = {n.removeprefix("_weight_"): t for n, t in tensors.items() if n.startswith("_weight_")}
        if not parts:
            return None
        where = f"torchao at {path!r}"
        described = _description(metadata or {}, f"{path}.weight", where)
        kind, facts = described["_type"], {n: _decoded(v) for n, v in described["_data"].items()}
        _require_readable(kind, where, CheckpointError)
        facts.setdefault("dtype", facts.get("orig_dtype", dtype))
        return _read(_Found(kind, parts, facts, shape, where, CheckpointError))

    def refuses(self, quantized: Quantized) -> str | None:
        if len(quantized.shape) != 2:
            return f"torchao's layers hold matrices, not shape {tuple(quantized.shape)}"
        if quantized.dtype not in _FLOATS:
            return f"torchao decodes to float32, bfloat16 or float16, not {_name(quantized.dtype)}"
        known = _REFUSALS.get(type(quantized.format))
        if known is None:
            return f"torchao has no class for {quantized.format!r}"
        return known(quantized)

    def write(self, quantized: Quantized, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        kind, parts, facts = _WRITERS[type(quantized.format)](quantized)
        described = {"_type": kind, "_data": facts, "_tensor_data_names": list(parts)}
        names = json.dumps([f"{path}.weight"])  # one list for all layers: whoever writes the file joins them
        return {f"_weight_{n}": t for n, t in parts.items()}, {f"{path}.weight": json.dumps(described), "tensor_names": names}

    def config(self, stored: Mapping[str, Quantized], dense: tuple[str, ...]) -> dict[str, Any]:
        made = {path: _config(q) for path, q in stored.items()}
        first = next(iter(made.values()))
        alike = all(c == first for c in made.values())
        return {
            "quant_method": "torchao",
            "quant_type": {"default": first if alike else _typed("FqnToConfig", 1, fqn_to_config=made)},
            "modules_to_not_convert": list(dense) or None,
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }


def _foreign(p: Any) -> bool:
    """Whether a parameter is of a class of torchao."""
    return type(p).__module__.startswith("torchao.")


# -- from tensors --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The class of a weight, its tensors by name and its options."""

    kind: str
    parts: Tensors
    facts: Mapping[str, Any]
    shape: torch.Size
    where: str
    error: type[ValueError]

    def part(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
        """Returns a tensor in a shape of as many entries.

        Raises:
            ValueError: If it is missing, or of another size or dtype.
        """
        if name not in self.parts:
            raise self.unlike(f"tensor {name!r} is required", sorted(self.parts))
        t = self.parts[name]
        if t.numel() != math.prod(shape):
            raise self.unlike(f"{name!r} must have shape {shape}", tuple(t.shape))
        if dtypes and t.dtype not in dtypes:
            raise self.unlike(f"{name!r} must be {' or '.join(map(_name, dtypes))}", _name(t.dtype))
        return t.reshape(shape).contiguous()

    def fact(self, name: str) -> Any:
        """Returns an option.

        Raises:
            ValueError: If it is missing, or a dtype that torch does not have.
        """
        if self.facts.get(name) is None:
            raise self.unlike(f"{name!r} must be given", sorted(n for n, v in self.facts.items() if v is not None))
        return self.facts[name]

    def unlike(self, rule: str, found: object) -> ValueError:
        """Returns the error that says what a tensor of this class must be."""
        return self.error(errors.say(f"{self.where}, {self.kind}", rule, found))

    def tiles(self) -> tuple[BlockSize, tuple[int, int]]:
        """Returns which entries share a scale, and the shape of their table."""
        rows, columns = self.shape
        size: Any = self.facts.get("block_size") or (rows, columns)
        pair = isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
        if not pair or rows % size[0] or columns % size[1]:
            raise self.unlike(f"block_size must divide {rows} x {columns}", size)
        r, c = size
        block: BlockSize = (r, c)
        if r == 1:
            block = "row" if c == columns else c
        elif (r, c) == (rows, columns):
            block = "tensor"
        return block, (rows // r, columns // c)


def _require_readable(kind: str, where: str, error: type[ValueError]) -> None:
    if kind not in _READERS:
        remedy = "quantize with a weight-only config: Int8, Float8, NVFP4, or Intx with weight_dtype=torch.int4"
        raise error(errors.say(where, f"one of {errors.listed(_READERS)} is required, whose layout is known", kind, remedy))


def _read(found: _Found) -> Quantized:
    active = [n for n in _ACTIVATIONS if found.facts.get(n) is not None] + [n for n in found.parts if n.startswith("act_")]
    if active:
        remedy = "a leaf is a weight alone, so quantize with a weight-only config"
        raise found.error(errors.say(f"{found.where}, {found.kind}", "inputs must be met as they are", active[0], remedy))
    data, fmt = _READERS[found.kind](found)
    return Quantized(data, fmt, found.shape, found.fact("dtype"))


def _integers(found: _Found) -> tuple[dict[str, Tensor], Any]:
    block, table = found.tiles()
    target = "int8" if found.kind == "Int8Tensor" else _name(found.fact("target_dtype"))
    if target not in _INTEGERS:
        raise found.unlike(f"target_dtype must be one of {errors.listed(_INTEGERS)}", target)
    bits = _INTEGERS[target]
    data = {"qdata": found.part("qdata", tuple(found.shape), (torch.int8,)), "scale": found.part("scale", table, _FLOATS)}
    zero = found.part("zero_point", table) if "zero_point" in found.parts else None
    if zero is None or not zero.any():
        return data, AffineInt(bits=bits, block_size=block, packing="int8")
    data["zero_point"] = _unsigned(zero, bits, found)
    return data, AffineInt(bits=bits, block_size=block, symmetric=False, packing="int8")


def _unsigned(zero: Tensor, bits: int, found: _Found) -> Tensor:
    """Returns zero points in units of the unsigned code."""
    shifted = zero.to(torch.float32) + 2 ** (bits - 1)
    wrong = shifted != shifted.round().clamp(0, 255)
    if wrong.any():
        raise found.unlike("'zero_point' must hold codes", float(zero[wrong][0]))
    return shifted.to(torch.uint8)


def _floats(found: _Found) -> tuple[dict[str, Tensor], Any]:
    block, table = found.tiles()
    codes = found.part("qdata", tuple(found.shape), tuple(_KINDS))
    scale = found.part("scale", table, _FLOATS).to(torch.float32)
    return {"qdata": codes, "scale": scale}, FP8(block_size=block, kind=_KINDS[codes.dtype])


def _nvfp4(found: _Found) -> tuple[dict[str, Tensor], Any]:
    rows, columns = found.shape
    data = {"qdata": found.part("qdata", (rows, columns // 2), (torch.uint8,)), "scale": _block_scales(found, 16)}
    if "per_tensor_scale" in found.parts:
        data["per_tensor_scale"] = found.part("per_tensor_scale", (), _FLOATS).to(torch.float32)
    return data, NVFP4(per_tensor="per_tensor_scale" in data)


def _block_scales(found: _Found, block_size: int) -> Tensor:
    rows, columns = found.shape[0], found.shape[1] // block_size
    if found.fact("block_size") != block_size:
        raise found.unlike(f"block_size must be {block_size}", found.fact("block_size"))
    dtypes = (torch.float8_e4m3fn,) if block_size == 16 else (torch.float8_e8m0fnu, torch.uint8)
    if not found.facts.get("is_swizzled_scales"):
        return found.part("scale", (rows, columns), dtypes)
    padded = (-(-rows // 128) * 32, -(-columns // 4) * 16)
    return unswizzled(found.part("scale", padded, dtypes), rows, columns)


def _mx(found: _Found) -> tuple[dict[str, Tensor], Any]:
    (rows, columns), element = found.shape, found.fact("elem_dtype")
    scale = _block_scales(found, 32).view(torch.uint8)
    if element in _KINDS:
        return {"qdata": found.part("qdata", (rows, columns), (element,)), "scale": scale}, MXFP8(kind=_KINDS[element])
    if element != torch.float4_e2m1fn_x2:
        raise found.unlike("elem_dtype must be float8_e4m3fn, float8_e5m2 or float4_e2m1fn_x2", element)
    return {"qdata": found.part("qdata", (rows, columns // 2), (torch.uint8,)), "scale": scale}, MXFP4()


def _nf4(found: _Found) -> tuple[dict[str, Tensor], Any]:
    count, block_size, group = found.shape.numel(), found.fact("block_size"), found.fact("scaler_block_size")
    dtype = found.fact("dtype")
    fmt = TorchAONF4(block_size=block_size, precision=_name(dtype))
    levels = found.part("nf4", (16,)).to(torch.float32)
    if levels.tolist() != list(fmt.levels):
        raise found.unlike("the levels must be torchao's own", levels.tolist())
    groups = count // block_size // group
    codes, factor = found.part("quantized_scalers", (groups, group)), found.part("quantization_factor", (groups, 1))
    # the scales in the library's order of operations and roundings
    scale = (codes / factor).flatten().to(dtype) + found.part("scaler_mean", ())
    return {"qdata": found.part("quantized_data", (count // 2,)), "scale": scale.to(torch.float32)}, fmt


_READERS: dict[str, Callable[[_Found], tuple[dict[str, Tensor], Any]]] = {
    "Int8Tensor": _integers,
    "IntxUnpackedToInt8Tensor": _integers,
    "Float8Tensor": _floats,
    "NVFP4Tensor": _nvfp4,
    "MXTensor": _mx,
    "NF4Tensor": _nf4,
}


def _description(metadata: Mapping[str, str], name: str, where: str) -> dict[str, Any]:
    """Reads the JSON that describes a weight; its name there may have a prefix more or less, that of a whole model.

    Raises:
        CheckpointError: If it is missing, no JSON, or not of this form.
    """
    keys = [k for k in metadata if k == name or k.endswith(f".{name}") or name.endswith(f".{k}")]
    if not keys:
        remedy = "save the model with transformers' save_pretrained"
        raise CheckpointError(errors.say(where, f"the metadata of the file must describe {name!r}", "none", remedy))
    try:
        found = json.loads(metadata[max(keys, key=lambda k: (k == name, len(k)))])
    except json.JSONDecodeError as e:
        raise CheckpointError(errors.say(where, "the description of the weight must be JSON", str(e))) from e
    if not isinstance(found, dict) or not isinstance(found.get("_type"), str) or not isinstance(found.get("_data"), dict):
        raise CheckpointError(errors.say(where, "the description of the weight must have '_type' and '_data'", found))
    return found


def _decoded(value: Any) -> Any:
    typed = isinstance(value, dict) and value.get("_type") == "torch.dtype"
    return getattr(torch, str(value["_data"]), None) if typed else value


# -- to tensors ----------------------------------------------------------------------------------------------------------------

Written = tuple[str, dict[str, Tensor], dict[str, Any]]


def _refuses_affine(q: Quantized) -> str | None:
    data, fmt = q.data, q.format
    if "g_idx" in data or "shift" in data:
        return "torchao has no act order" if "g_idx" in data else "torchao stores integer zero points, not float shifts"
    zero = data.get("zero_point")
    if zero is not None and (zero.is_floating_point() or int(zero.max()) > 127 + 2 ** (fmt.bits - 1)):
        return "torchao stores zero points as int8"
    if fmt.layout != "matrix":
        return f"torchao's groups are parts of rows, not of layout {fmt.layout!r}"
    if _is_int8(q) and fmt.block_size == "tensor":
        return None
    return _refuses_blocks(q, ("row",))


def _refuses_blocks(q: Quantized, names: tuple[str, ...]) -> str | None:
    block = q.format.block_size
    if not (isinstance(block, int) or block in names):
        return f"torchao's groups are parts of rows, not block_size {block!r}"
    ragged = isinstance(block, int) and q.shape[1] % block
    return f"in_features must be a multiple of block_size {block}" if ragged else None


def _refuses_nvfp4(q: Quantized) -> str | None:
    whole = q.data.get("per_tensor_scale")
    return None if whole is None or whole.ndim == 0 else "torchao's layers have one per_tensor_scale"


def _says(reason: str) -> Callable[[Quantized], str]:
    return lambda q: reason


_UNSAVED = "transformers does not save torchao's NF4Tensor"
_NO_PRODUCT = "torchao has no product with an MXTensor that leaves the input as it is"

#: Why a weight of each format cannot be written, or ``None``.
_REFUSALS: dict[type, Callable[[Quantized], str | None]] = {
    AffineInt: _refuses_affine,
    FP8: lambda q: _refuses_blocks(q, ("row", "tensor")),
    NVFP4: _refuses_nvfp4,
    Int8: _says("torchao multiplies by the scale, not by scale / 127; store it as AffineInt(bits=8, block_size='row')"),
    MXFP4: _says(_NO_PRODUCT),
    MXFP8: _says(_NO_PRODUCT),
    NF4: _says(_UNSAVED),
    TorchAONF4: _says(_UNSAVED),
}


def _is_int8(q: Quantized) -> bool:
    # torchao 0.18 leaves the zero point of an Int8Tensor out of its product, so one with zeros is an Intx of 8 bits
    return q.format.bits == 8 and "zero_point" not in q.data


def _block_of(q: Quantized) -> list[int]:
    rows, columns = q.shape
    block = q.format.block_size
    return [rows, columns] if block == "tensor" else [1, columns if block == "row" else block]


def _write_affine(q: Quantized) -> Written:
    repacked = q.format.repacked(q, "int8")
    parts = {"qdata": repacked.data["qdata"], "scale": q.data["scale"]}
    facts = {"block_size": _block_of(q), "dtype": _dtype(q.dtype)}
    if _is_int8(q):
        return "Int8Tensor", parts, facts
    bits = q.format.bits
    middle = 2 ** (bits - 1)
    zero = q.data.get("zero_point")
    if zero is None:
        zero = torch.full_like(parts["scale"], middle, dtype=torch.uint8)
    parts["zero_point"] = (zero.to(torch.int16) - middle).to(torch.int8)
    return "IntxUnpackedToInt8Tensor", parts, {**facts, "target_dtype": _intx(bits), "activation_quantization": None}


def _write_fp8(q: Quantized) -> Written:
    parts = {"qdata": q.data["qdata"], "scale": q.data["scale"]}
    return "Float8Tensor", parts, {"block_size": _block_of(q), "dtype": _dtype(q.dtype)}


def _write_nvfp4(q: Quantized) -> Written:
    parts = {**q.data, "scale": swizzled(q.data["scale"])}
    facts = {"block_size": 16, "orig_dtype": _dtype(q.dtype), "is_swizzled_scales": True}
    return "NVFP4Tensor", parts, facts


_WRITERS: dict[type, Callable[[Quantized], Written]] = {AffineInt: _write_affine, FP8: _write_fp8, NVFP4: _write_nvfp4}


# -- its config ----------------------------------------------------------------------------------------------------------------


def _config(q: Quantized) -> dict[str, Any]:
    """Returns the config that would make a weight of this kind, as torchao serializes it."""
    fmt = q.format
    if isinstance(fmt, NVFP4):
        return _typed("NVFP4WeightOnlyConfig", 1, use_dynamic_per_tensor_scale=fmt.per_tensor)
    block = fmt.block_size
    groups = _typed("PerGroup", 1, group_size=block) if isinstance(block, int) else None
    named = groups or (_typed("PerTensor", 1) if block == "tensor" else _typed("PerRow", 1, dim=-1))
    if isinstance(fmt, FP8):
        return _typed("Float8WeightOnlyConfig", 2, weight_dtype=_dtype(fmt.element.dtype), granularity=named)
    if _is_int8(q):
        return _typed("Int8WeightOnlyConfig", 2, granularity=named)
    kind = {"_type": "MappingType", "_data": "ASYMMETRIC" if "zero_point" in q.data else "SYMMETRIC"}
    along = groups or _typed("PerAxis", 1, axis=0)
    return _typed("IntxWeightOnlyConfig", 2, weight_dtype=_intx(fmt.bits), granularity=along, mapping_type=kind)


def _typed(kind: str, version: int, **fields: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": fields}


def _dtype(dtype: torch.dtype) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": _name(dtype)}


def _intx(bits: int) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": f"int{bits}"}
