"""Fused attention under torch.func, and how transformers' models come by it.

torch 2.13 has no rule by which its fused attention on the CPU maps: under ``vmap`` it runs member by member, with a warning.
``attention`` is that kernel with a rule, which folds the mapped axis into the batch:

    out = softmax(scale * Q K^T + mask) V

Outside of a transform nothing changes: the very function that transformers calls for ``sdpa`` is called. Imports torch alone;
transformers only if it is imported already.

References:
    Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762, eq. (1).
    Dao et al., FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness, 2022, arXiv 2205.14135.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

#: The name under which transformers' registries of attention and of masks know this.
NAME = "funcpeft_sdpa"

#: Scores of a head (tokens times length) up to which plain operations are faster under torch.func than the kernel, whose
#: autograd function costs there some 0.2 ms a call and 0.6 ms with its gradient.
PLAIN_UP_TO = 2**10

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Computes attention as ``F.scaled_dot_product_attention`` does, with a rule for ``vmap`` and for derivatives of any order.

    Args:
        query: ``(batch, heads, tokens, dim)``.
        key: ``(batch, heads, length, dim)``; with ``enable_gqa`` its heads may be a divisor of the query's.
        value: As ``key``.
        attn_mask: What is added to the scores or, if boolean, where they count; broadcasts to ``(batch, heads, tokens,
            length)``.
        dropout_p: Probability with which a weight is dropped.
        is_causal: Whether token ``i`` attends to the first ``i + 1`` alone.
        scale: What multiplies the scores, ``dim ** -0.5`` by default.
        enable_gqa: Whether groups of query heads share a head of key and value.

    Returns:
        ``(batch, heads, tokens, dim)``.

    Note:
        Where the fused kernel of the CPU is not what torch would take (another device, dropout, other shapes, autocast,
        ``sdpa_kernel``), torch's function is called as it is. Forward mode, ``torch.compile`` and small inputs go through the
        formula in plain operations, which holds all scores at once; so do the gradient of a mask and second derivatives.
        Forward mode over a pullback that was made outside of it (``jvp`` of what ``vjp`` returned) is refused by torch.

    Example:
        >>> import torch
        >>> from funcpeft.attention import attention
        >>> q, k, v = torch.ones(3, 1, 2, 4, 8).unbind()
        >>> torch.func.vmap(attention, in_dims=(0, None, None))(torch.stack([q, 2 * q]), k, v).shape
        torch.Size([2, 1, 2, 4, 8])
    """
    if not _fused(query, key, value, attn_mask, dropout_p, enable_gqa):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    mask = attn_mask
    if mask is not None:
        mask = mask if mask.ndim == 4 else mask[None, None]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
    if torch.compiler.is_compiling() or _forward_mode() or query.shape[2] * key.shape[2] <= PLAIN_UP_TO:
        return _formula(query, key, value, mask, causal=is_causal, scale=scale)
    return _Attention.apply(query, key, value, mask, is_causal, scale)[0]


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, grouped: bool) -> bool:
    """Whether torch would take its fused kernel of the CPU, the gradient of a mask left aside."""
    allowed = torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled()  # dynamo cannot trace the latter
    if not allowed or torch.is_autocast_enabled("cpu"):
        return False
    if any(t.ndim != 4 or t.device.type != "cpu" or t.dtype != q.dtype or t.numel() == 0 for t in (q, k, v)):
        return False
    heads = k.shape[1] if grouped else q.shape[1]
    if q.dtype not in _DTYPES or dropout or k.shape != (q.shape[0], heads, k.shape[2], q.shape[3]) or k.shape != v.shape:
        return False
    if q.shape[1] % heads or mask is None:
        return q.shape[1] % heads == 0
    scores = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    broadcasts = mask.ndim in (2, 4) and all(m in (1, n) for m, n in zip(mask.shape, scores[-mask.ndim :], strict=True))
    return broadcasts and mask.dtype in (torch.bool, torch.float32, q.dtype)


def _forward_mode() -> bool:
    """Whether forward mode is at work, in which torch would lose the outer tangent of two at an autograd function's own rule.

    torch 2.13 has no public way to ask; if the private one goes, torch says that there is no rule.
    """
    return getattr(forward_ad, "_current_level", -1) >= 0


def _formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Computes attention in plain operations, in float32 at least; a token that attends to nothing gets zero, as in torch."""
    wide, groups = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    keys, values = (t.to(wide).repeat_interleave(groups, 1) if groups > 1 else t.to(wide) for t in (k, v))
    scores = (q.to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)) @ keys.transpose(-1, -2)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if mask is None:
        weights = torch.softmax(scores, -1)
    else:
        scores = scores + mask
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(nothing, 0), -1).masked_fill(nothing, 0)
    return (weights @ values).to(q.dtype)


def _gradients(grad: Tensor, *inputs: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, ...]:
    """Returns the gradients of query, key, value and, if it is given, mask, by the formula."""
    back: Any = torch.func.vjp(functools.partial(_formula, causal=causal, scale=scale), *inputs)[1]
    return back(grad)


class _Attention(torch.autograd.Function):
    """The fused kernel: ``(out, logsumexp of the scores)``."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Any:
        return _FORWARD(_dense(q), _dense(k), _dense(v), 0.0, causal, attn_mask=mask, scale=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, mask, causal, scale = inputs
        ctx.static = {"causal": causal, "scale": scale}
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, mask, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:  # type: ignore[override]
        q, k, v, mask, out, logsumexp = ctx.saved_tensors
        if ctx.needs_input_grad[3]:  # of which the kernel knows nothing
            return *_gradients(grad, q, k, v, mask, **ctx.static), None, None
        return *_Gradient.apply(grad, q, k, v, mask, out, logsumexp, *ctx.static.values()), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, q: Any, k: Any, v: Any, mask: Any, causal: Any, scale: Any) -> Any:  # type: ignore[override]
        n = info.batch_size
        qkv = [_folded(n, t, d) for t, d in zip((q, k, v), in_dims[:3], strict=True)]
        out = _Attention.apply(*qkv, _folded_mask(n, mask, in_dims[3], len(qkv[0]) // n), causal, scale)
        return tuple(t.unflatten(0, (n, -1)) for t in out), (0, 0)


class _Gradient(torch.autograd.Function):
    """The kernel of the gradients of query, key and value; its own derivatives are those of the formula.

    ``out`` and ``logsumexp`` are functions of the other inputs, which carry the derivatives through them as well.
    """

    @staticmethod
    def forward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        out: Tensor,
        logsumexp: Tensor,
        causal: bool,
        scale: float | None,
    ) -> Any:
        tensors = (_dense(t) for t in (grad, q, k, v, out))
        return _BACKWARD(*tensors, logsumexp, 0.0, causal, attn_mask=mask, scale=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, _, _, causal, scale = inputs
        ctx.static = {"causal": causal, "scale": scale}
        ctx.save_for_backward(*tensors)

    @staticmethod
    def _of(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _gradients(*inputs, **ctx.static)[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        given = [t for t in ctx.saved_tensors if t is not None]
        back: Any = torch.func.vjp(functools.partial(_Gradient._of, ctx), *given)[1]
        found = back(grads)
        return *found, *(None,) * (9 - len(found))

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad: Any, q: Any, k: Any, v: Any, mask: Any, *rest: Any) -> Any:  # type: ignore[override]
        n, (out, logsumexp, causal, scale) = info.batch_size, rest
        grad, q, k, v = (_folded(n, t, d) for t, d in zip((grad, q, k, v), in_dims[:4], strict=True))
        out, logsumexp = (_folded(n, t, d) for t, d in zip((out, logsumexp), in_dims[5:7], strict=True))
        mask = _folded_mask(n, mask, in_dims[4], len(q) // n)
        found = _Gradient.apply(grad, q, k, v, mask, out, logsumexp, causal, scale)
        return tuple(t.unflatten(0, (n, -1)) for t in found), (0, 0, 0)


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()  # the kernels believe it without a look


def _folded(n: int, t: Tensor, dim: int | None) -> Tensor:
    mapped = t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)
    return mapped.flatten(0, 1)


def _folded_mask(n: int, mask: Tensor | None, dim: int | None, batch: int) -> Tensor | None:
    if mask is None or (dim is None and mask.shape[0] == 1):  # one for every row
        return mask
    mapped = mask.expand(n, *mask.shape) if dim is None else mask.movedim(dim, 0)
    return mapped.expand(n, batch, *mapped.shape[2:]).flatten(0, 1)


# -- transformers' models --------------------------------------------------------------------------------------------------


def choose_attention(module: nn.Module) -> None:
    """Makes the transformers models in a module take this attention where they would take ``sdpa``; writes their configs.

    Args:
        module: A structure of one's own to write, never the module of a user.

    Note:
        A config is left alone if a module that holds it comes from a file that compares the implementation's name with
        ``"sdpa"`` (Falcon, Gemma 4, DeepSeek 3.2 and others), or has attention that does not ask the registry for it.
    """
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedConfig

    configs: dict[int, PreTrainedConfig] = {}
    kept: set[int] = set()
    for m in module.modules():
        config = vars(m).get("config")
        if isinstance(config, PreTrainedConfig) and config._attn_implementation == "sdpa":
            configs[id(config)] = config
            files = {c.__module__ for c in type(m).__mro__ if issubclass(c, nn.Module)}
            kept |= set() if all(map(_asks, files)) else {id(config)}
    if configs:
        _register()
    for key, config in configs.items():
        if key not in kept:
            config._attn_implementation_internal = NAME  # the public setter reaches the configs in it too


@functools.cache
def _asks(file: str) -> bool:
    """Whether the attention in a file of classes is looked up by its name, and the name is used for nothing else."""
    try:
        source = inspect.getsource(sys.modules[file])
    except (KeyError, OSError, TypeError):
        return False
    own = re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE)
    compares = re.search(r"_attn_implementation\b[^\n]*(==|!=|\bin\b)[^\n]*\bsdpa\b", source)
    return compares is None and (own is None or "ALL_ATTENTION_FUNCTIONS" in source)


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _sdpa)
    AttentionMaskInterface.register(NAME, _mask)


class _Mapped(TorchFunctionMode):
    """While it is on, ``F.scaled_dot_product_attention`` is ``attention``."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        called = attention if func is F.scaled_dot_product_attention else func
        return called(*args, **(kwargs or {}))


def _sdpa(*args: Any, **kwargs: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    call: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not torch._C._are_functorch_transforms_active():
        return call(*args, **kwargs)
    with _Mapped():
        return call(*args, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Makes the mask that ``sdpa`` makes; one with a member axis is made whole, since its values cannot be looked at."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    make: Any = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return make(*args, **kwargs)
    try:
        return make(*args, **kwargs)
    except RuntimeError:  # vmap's, of a branch on values
        return make(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
