"""Preparing a quantized base for training: half-precision parameters become float32, codes and scales stay as they are.

The pure form of peft's ``prepare_model_for_kbit_training``. Imports functional, quant, storage, errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.functional import Model, Params
from funcpeft.quant.codebook import Codebook
from funcpeft.quant.torchaonf4 import TorchAONF4
from funcpeft.storage import Quantized

#: The ``quant_method`` of models whose half-precision parameters peft leaves as they are.
LEFT_ALONE = ("gptq", "aqlm", "eetq", "hqq", "torchao")
_HALF = (torch.float16, torch.bfloat16)


def prepare_kbit(
    model: Model, params: Params, *, remat: bool = True, compute_dtype: torch.dtype | None = None
) -> tuple[Model, Params]:
    """Prepares a quantized base for training, as peft's ``prepare_model_for_kbit_training`` does.

    Every parameter in float16 or bfloat16 (norms, embeddings, the head, biases, layers that are not quantized) becomes
    float32, so activations between layers are float32 too. Buffers keep their dtype. ``Quantized`` leaves keep their codes and
    scales, and their dtype is the one in which they are multiplied: a layer casts its float32 input to it, and its output
    back. Where nothing is multiplied (an embedding, a weight that its module reads by itself) a leaf of half precision
    decodes to float32 from here on.

    A model that GPTQ, AQLM, EETQ, HQQ or torchao has quantized keeps every dtype, as in peft. Which it was is read from the
    model's config, and from layouts of codes that only one of them has.

    Args:
        model: The model that the params are for.
        params: Its leaves; not changed.
        remat: Whether a call of the model returned recomputes its blocks in backward (peft: gradient checkpointing).
        compute_dtype: The dtype in which quantized weights are multiplied, bitsandbytes' ``bnb_4bit_compute_dtype``; by
            default each leaf's own, half precision after loading in half precision.

    Returns:
        The model, and new params for it; leaves that stay as they are, and tied ones, are shared.

    Raises:
        KeyError: If ``params`` is not of this model.
        TypeError: If ``model`` is not a ``Model``, or ``params`` is not a dict.
        ValueError: If ``compute_dtype`` is not a floating dtype.

    Note:
        The adapter trained serves the params given as well, and merging should start from them: what was half precision then
        stays so. A layer whose weight its module also reads by itself (Mamba's ``dt_proj``) needs ``compute_dtype`` float32,
        or a weight that is not quantized. peft turns checkpointing on for quantized models alone; here ``remat`` means the
        same for every model.

    Example:
        >>> import torch
        >>> from funcpeft import NF4, functionalize, quantize
        >>> block = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).bfloat16()
        >>> model, params = functionalize(block)
        >>> stored = quantize(model, params, NF4(), target_modules=["0"])
        >>> model, ready = prepare_kbit(model, stored, remat=False)
        >>> ready["1.weight"].dtype, ready["0.weight"].dtype, ready["0.weight"] is stored["0.weight"]
        (torch.float32, torch.bfloat16, True)
        >>> model(ready, torch.zeros(2, 64)).dtype
        torch.float32

    References:
        Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, arXiv 2305.14314, section 3.
    """
    if not isinstance(model, Model):
        found, remedy = type(model).__name__, "the model comes first, then params"
        raise TypeError(errors.say("prepare_kbit", "a Model is required", found, remedy))
    if not isinstance(params, dict):
        found, remedy = type(params).__name__, "take params from functionalize"
        raise TypeError(errors.say("prepare_kbit", "params must be a dict of leaves", found, remedy))
    if compute_dtype is not None and not (isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point):
        raise ValueError(errors.say("prepare_kbit", "compute_dtype must be a floating dtype", compute_dtype))
    model.check(params)
    made = model.replace(remat=True) if remat else model
    cast = not _left_alone(model, params)
    met = _met(model, params)
    widened: dict[int, Tensor] = {}  # a tensor under two keys stays one

    def ready(key: str, leaf: Any) -> Any:
        half = cast and leaf.dtype in _HALF and key not in model.buffers
        if isinstance(leaf, Quantized):
            return _decoding(leaf, compute_dtype if met[key] else torch.float32 if half else None)
        if half and id(leaf) not in widened:
            widened[id(leaf)] = leaf.to(torch.float32)
        return widened[id(leaf)] if half else leaf

    out = {key: ready(key, leaf) for key, leaf in params.items()}
    made.prepare(frozenset(k for k, v in out.items() if isinstance(v, Quantized)))
    return made, out


def _decoding(leaf: Quantized, dtype: torch.dtype | None) -> Quantized:
    """Returns a leaf that decodes to a dtype, its tensors shared."""
    return leaf if dtype in (None, leaf.dtype) else replace(leaf, dtype=dtype)


def _met(model: Model, params: Params) -> dict[str, bool]:
    """Says of every ``Quantized`` leaf whether all that read it are layers that multiply a float input by it."""
    readers = {key: [key] for key, leaf in params.items() if isinstance(leaf, Quantized)}
    for alias, key in model.ties.items():
        if key in readers and alias not in params:
            readers[key].append(alias)
    sites = {key: [model.site(k) for k in keys] for key, keys in readers.items()}
    return {key: all(s.met and not s.kind.takes_ids for s in found) for key, found in sites.items()}


def _left_alone(model: Model, params: Params) -> bool:
    """Whether one of the libraries whose models peft leaves alone has quantized this one, by its config or its layouts."""
    config: Any = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    formats = {leaf.format for leaf in params.values() if isinstance(leaf, Quantized)}
    own = any(isinstance(f, Codebook | TorchAONF4) or getattr(f, "packing", None) in ("gptq", "hqq") for f in formats)
    return own or getattr(method, "value", method) in LEFT_ALONE
