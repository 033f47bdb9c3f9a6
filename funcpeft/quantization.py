"""Quantizing a tree of params and back: chosen leaves become ``Quantized``, all others are shared.

Imports targets, functional, quant, errors.
"""

from __future__ import annotations

from collections.abc import Sequence

from funcpeft import errors, layers, targets
from funcpeft.functional import Model, Params
from funcpeft.method import Method
from funcpeft.quant.format import Format
from funcpeft.weights import Quantized, dense


def quantize(
    model: Model,
    params: Params,
    format: Format,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
) -> Params:
    """Stores the weights of chosen layers in a format.

    Args:
        model: The model that the params are for.
        params: Its leaves; not changed.
        format: A format such as ``NF4()``.
        target_modules: Which layers, by peft's rules.
        exclude_modules: Which of them to leave dense.

    Returns:
        New params; leaves that stay dense are shared with the argument.

    Raises:
        NoMatchError: If a rule matches nothing.
        TypeError: If a target is not a layer with a matrix, or its leaf is already ``Quantized``.
        ValueError: If a weight does not fit the format; the message names the site.
    """
    if not isinstance(format, Format):
        raise TypeError(errors.say("quantize", "a format is required", type(format).__name__, "pass an instance such as NF4()"))
    if not isinstance(model, Model):
        raise TypeError(
            errors.say("quantize", "a Model is required", type(model).__name__, "the model comes first, then params")
        )
    model.check(params)
    rule = Method(
        target_modules=tuple(target_modules) if not isinstance(target_modules, str) else target_modules,
        exclude_modules=exclude_modules
        if exclude_modules is None or isinstance(exclude_modules, str)
        else tuple(exclude_modules),
    )
    modules = dict(model.modules())
    out = dict(params)
    for path in targets.target_paths(model, rule):
        known = layers.kind_of(modules[path])
        if known is None:
            raise TypeError(
                errors.say(f"quantize at {path!r}", "a layer with a matrix is required", type(modules[path]).__name__)
            )
        key = f"{path}.weight"
        key = key if key in params else model.ties[key]  # params may carry an alias, which unties it
        if isinstance(params[key], Quantized):
            raise TypeError(
                errors.say(f"quantize at {path!r}", "a dense weight is required", "a Quantized leaf", "call dequantize first")
            )
        try:
            out[key] = format.requant(params[key])
        except ValueError as e:
            raise ValueError(f"quantize at {path!r}: {e}") from e
    model.prepare(frozenset(k for k, v in out.items() if isinstance(v, Quantized)))
    return out


def dequantize(params: Params) -> Params:
    """Returns params in which every ``Quantized`` leaf is the dense weight it stands for; others are shared."""
    return {k: dense(v) if isinstance(v, Quantized) else v for k, v in params.items()}
