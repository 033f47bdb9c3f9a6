"""One structured option for a quantized base, as training configurations have it, and the format that it means.

.. code-block:: yaml

    quantization:
      backend: bnb
      weight_dtype: nf4
      double_quant: true

or, as axolotl nests it, ``bnb: {weight_dtype: nf4}``. The backend names the library whose layout the weights get; where
transformers loads checkpoints of it, ``write_quantized`` can write one. Every contradiction is an error that says what to
write instead. Imports transformers, quant.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from funcpeft import errors
from funcpeft.interop.transformers import checkpoint_quantization, quant_method, quantization_of
from funcpeft.quant.affineint import AffineInt
from funcpeft.quant.blocks import BlockSize
from funcpeft.quant.format import Format
from funcpeft.quant.fp4 import FP4
from funcpeft.quant.fp8 import FP8
from funcpeft.quant.int8 import Int8
from funcpeft.quant.mxfp4 import MXFP4
from funcpeft.quant.mxfp8 import MXFP8
from funcpeft.quant.nf4 import NF4
from funcpeft.quant.nvfp4 import NVFP4
from funcpeft.quant.ternary import Ternary


@dataclass(frozen=True)
class _Dtype:
    """What a backend stores under a ``weight_dtype``.

    Attributes:
        make: The format, given the group size.
        group: The default group size; with ``fixed`` the only one, ``None`` if there is none.
    """

    make: Callable[[Any], Format]
    group: BlockSize | None = None
    fixed: bool = False


def _affine(bits: int, group: BlockSize, packing: str, **options: Any) -> _Dtype:
    return _Dtype(lambda g: AffineInt(bits=bits, block_size=g, packing=packing, **options), group)


def _one(fmt: Format, group: int | None = None) -> _Dtype:
    return _Dtype(lambda g: fmt, group, fixed=True)


_BACKENDS: dict[str, dict[str, _Dtype]] = {
    "bnb": {
        "nf4": _Dtype(lambda g: NF4(block_size=g), 64),
        "fp4": _Dtype(lambda g: FP4(block_size=g), 64),
        "int8": _one(Int8()),
    },
    "torchao": {
        **{f"int{bits}": _affine(bits, 32, "int8") for bits in range(2, 8)},
        "int8": _affine(8, "row", "int8"),
        "fp8": _one(FP8()),
        "float8_e5m2": _one(FP8(kind="e5m2")),
        "nvfp4": _one(NVFP4(), 16),
    },
    "gptq": {f"int{bits}": _affine(bits, 128, "gptq") for bits in (2, 3, 4, 8)},
    "awq": {"int4": _affine(4, 128, "awq", symmetric=False)},
    "hqq": {f"int{bits}": _affine(bits, 64, "hqq", symmetric=False, layout="flat") for bits in (1, 2, 3, 4, 8)},
    "quanto": {
        **{f"int{bits}": _affine(bits, 128, "quanto", symmetric=False, layout="flat") for bits in (2, 4)},
        "int8": _Dtype(lambda g: AffineInt(bits=8, block_size="row", packing="int8"), fixed=True),
        "fp8": _one(FP8()),
    },
    "compressed-tensors": {
        "int4": _affine(4, 128, "compressed"),
        "int8": _affine(8, "row", "compressed"),
        "fp8": _one(FP8()),
    },
    "fp8": {"fp8": _one(FP8(block_size=(128, 128))), "mxfp8": _one(MXFP8(), 32)},
    "mxfp4": {"mxfp4": _one(MXFP4(), 32)},
    "bitnet": {"ternary": _one(Ternary())},
}
#: Backends that are named after the dtype they store need no ``weight_dtype``.
_IMPLIED = {"fp8": "fp8", "mxfp4": "mxfp4", "bitnet": "ternary"}
_SPELLED = {"bitsandbytes": "bnb", "compressed_tensors": "compressed-tensors", "optimum-quanto": "quanto"}
_DTYPES = {"float8": "fp8", "float8_e4m3fn": "fp8", "fp8_e4m3": "fp8", "fp8_e5m2": "float8_e5m2", "uint4": "int4"}
_FIELDS = ("backend", "weight_dtype", "group_size", "double_quant", "activation_dtype", "quantize_embedding")
_LEGACY = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}
_DENSE_MX = (
    "torchao has no weight-only layer for {0} (its MX layers round activations too); use backend 'mxfp4' for experts stored "
    "so, or weight_dtype 'nvfp4'"
)


def choose_format(options: Mapping[str, Any], config: Any = None) -> Format:
    """Returns the format that a structured option means.

    Args:
        options: ``backend`` (``bnb``, ``torchao``, ``gptq``, ``awq``, ``hqq``, ``quanto``, ``compressed-tensors``, ``fp8``,
            ``mxfp4``, ``bitnet``), ``weight_dtype``, and where they exist ``group_size`` (-1 for whole rows) and
            ``double_quant``; or the fields under the backend's name. Fields that are ``None`` or ``False`` are as if absent.
        config: The base's config, the content of its ``config.json``, or its folder: refused if it is quantized already.

    Raises:
        ValueError: If there is no backend or several, the backend has not the dtype, a field does not apply, a field is not
            known, activations are to be quantized, or the base is quantized already; the message says what to write.

    Example:
        >>> choose_format({"backend": "bnb", "weight_dtype": "nf4", "double_quant": True})
        NF4(block_size=64, double_quant=True)
    """
    given = _flat({k: v for k, v in options.items() if v is not None and v is not False})
    _require_dense(config)
    backend = _backend(given)
    _require_weights_only(given)
    name = _dtype(backend, given)
    found = _BACKENDS[backend][name]
    fmt = found.make(_group(backend, name, found, given))
    return _doubled(fmt, backend, name) if given.get("double_quant") else fmt


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields, taken out from under a backend's name if they are there."""
    nested = [k for k, v in options.items() if _spelled(k) in _BACKENDS and isinstance(v, Mapping)]
    named = [options["backend"]] if "backend" in options else []
    if len(nested) + len(named) > 1:
        raise _wrong("exactly one backend is required", errors.listed([*named, *nested]), "remove all but one")
    fields = {k: v for k, v in options.items() if k not in nested}
    for name in nested:
        fields |= {"backend": name, **{k: v for k, v in options[name].items() if v is not None and v is not False}}
    for name in fields:
        if name not in _FIELDS and name not in _LEGACY:
            raise _wrong("fields must be known", repr(name), errors.nearest(str(name), (*_FIELDS, *_BACKENDS)))
    return fields


def _spelled(backend: object) -> str:
    name = str(backend).lower()
    return _SPELLED.get(name, name)


def _backend(given: Mapping[str, Any]) -> str:
    for flag, dtype in _LEGACY.items():
        if flag in given:
            beside = [k for k in ("weight_dtype", "backend") if k in given]
            rule = f"{flag} is the older spelling" + (f" and contradicts {errors.listed(beside)}" if beside else "")
            raise _wrong(rule, f"{flag}={given[flag]!r}", f"write backend='bnb', weight_dtype='{dtype}' without it")
    if "backend" not in given:
        raise _wrong("exactly one backend is required", "none", f"known are {errors.listed(_BACKENDS, 20)}")
    backend = given["backend"]
    if isinstance(backend, list | tuple):
        raise _wrong("exactly one backend is required", errors.listed(backend), "remove all but one")
    if _spelled(backend) not in _BACKENDS:
        raise _wrong("backend must be known", repr(backend), errors.nearest(_spelled(backend), _BACKENDS))
    return _spelled(backend)


def _require_weights_only(given: Mapping[str, Any]) -> None:
    if "activation_dtype" in given:
        found = f"activation_dtype={_text(given['activation_dtype'])!r}"
        if "weight_dtype" not in given:
            raise _wrong("weight_dtype is required: weights are stored, activations are not", found, "name a weight_dtype")
        rule = "only weights are stored; activations are computed in the model's dtype"
        raise _wrong(rule, found, "leave activation_dtype out")
    if "quantize_embedding" in given:
        found = f"quantize_embedding={given['quantize_embedding']!r}"
        raise _wrong("which layers are stored is not a part of the format", found, "name them in quantize's target_modules")


def _text(dtype: object) -> str:
    return str(dtype).removeprefix("torch.").lower()


def _dtype(backend: str, given: Mapping[str, Any]) -> str:
    known = _BACKENDS[backend]
    if "weight_dtype" not in given and backend not in _IMPLIED:
        raise _wrong("weight_dtype is required", None, f"{backend} has {errors.listed(known, 20)}")
    text = _text(given.get("weight_dtype", _IMPLIED.get(backend)))
    name = _DTYPES.get(text, text)
    if name in known:
        return name
    if backend == "torchao" and name in ("mxfp4", "mxfp8"):
        raise _wrong("weight_dtype must be one that is stored by itself", repr(text), _DENSE_MX.format(name))
    others = [b for b, dtypes in _BACKENDS.items() if name in dtypes]
    hint = f", and {name!r} is that of {errors.listed(others, 20)}" if others else ""
    raise _wrong(f"weight_dtype must be one that {backend} has", repr(text), f"it has {errors.listed(known, 20)}{hint}")


def _group(backend: str, name: str, found: _Dtype, given: Mapping[str, Any]) -> BlockSize | None:
    size = given.get("group_size")
    if size is None:
        return found.group
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise _wrong("group_size must be a positive int, or -1 for whole rows", repr(size))
    if found.fixed and size != found.group:
        rule = f"{backend}'s {name} has no group_size" if found.group is None else f"{name} has the group_size {found.group}"
        raise _wrong(rule, str(size), "leave group_size out")
    if size == -1 and backend in ("bnb", "hqq", "quanto"):
        raise _wrong(f"group_size must be positive with {backend}", "-1", f"its default is {found.group}")
    return "row" if size == -1 else size


def _doubled(fmt: Format, backend: str, name: str) -> Format:
    if isinstance(fmt, NF4):
        return NF4(block_size=fmt.block_size, double_quant=True)
    if isinstance(fmt, FP4):
        return FP4(block_size=fmt.block_size, double_quant=True)
    raise _wrong("double_quant is for bnb's nf4 and fp4", f"{backend}'s {name}", "leave double_quant out")


def _require_dense(config: Any) -> None:
    if config is None:
        return
    stored = checkpoint_quantization(config) if isinstance(config, str | os.PathLike) else quantization_of(config)
    if stored:
        raise _wrong(
            "a base that is not quantized is required",
            f"one already quantized as {quant_method(stored)}",
            "load it with load_pretrained, whose leaves are stored weights",
        )


def _wrong(rule: str, found: object = None, remedy: str = "") -> ValueError:
    return ValueError(errors.say("quantization", rule, found, remedy))
