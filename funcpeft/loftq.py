r"""LoftQ: a quantized base and an adapter that together are near the dense weights.

.. math:: \min_{Q, A, B} \|W - Q - s B A\|_F

by turns: Q = requant(W - s B A), then s B A = the best rank-r approximation of W - Q. Any format that can be made of a weight
takes part. Imports adapt, quantization, methods.

References:
    Li et al., LoftQ, 2023, arXiv 2310.08659, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from funcpeft import errors
from funcpeft.adapt import Net
from funcpeft.entries import Entry
from funcpeft.functional import Params
from funcpeft.quant.format import Format
from funcpeft.storage import Quantized
from funcpeft.tree import Adapter, as_tuple
from funcpeft.weights import dense


def loftq(
    net: Net, params: Params, format: Format, *, seed: int = 0, iterations: int = 1, progress: bool | None = None
) -> tuple[Params, Any]:
    """Quantizes the weights that a net's LoRA adapts and starts the adapter from what that loses.

    Args:
        net: A net whose LoRA has ``init_lora_weights="loftq"``; its ranks and scalings are used.
        params: Dense params; not changed.
        format: The format of the adapted weights; others stay as they are (``quantize`` stores them).
        seed: For the entries of the net that draw.
        iterations: Alternations. More lower the error at four bits and above; at two they can raise it, since the residual
            that is stored has larger extremes than W.
        progress: Whether to show a bar on stderr; by default on a terminal.

    Returns:
        ``(params, adapter)``: params with the adapted weights stored, and the adapter.

    Raises:
        CannotRequantizeError: If the format cannot be made from a weight.
        TypeError: If an adapted weight is not a dense tensor.
        ValueError: If no LoRA of the net starts with LoftQ, ``iterations`` is not positive, or a weight does not fit.
    """
    entries = [(i, e) for i, e in enumerate(net.entries) if getattr(e.method, "init_lora_weights", None) == "loftq"]
    if not entries:
        remedy = "make the net with LoRA(init_lora_weights='loftq')"
        raise ValueError(errors.say("loftq", "a LoRA that starts with LoftQ is required", repr(net), remedy))
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(errors.say("loftq", "iterations must be a positive int", repr(iterations)))
    seen: dict[str, str] = {}
    for path, key in _weights(entries):
        if key in seen:
            rule, found = (
                "one LoRA must start from what quantizing a weight loses",
                f"a second one; the first is at {seen[key]!r}",
            )
            raise ValueError(errors.say(f"loftq at {path!r}", rule, found, "give the others init_lora_weights=True"))
        seen[key] = path
        if isinstance(params.get(key), Quantized):
            remedy = "start from the dense params"
            raise TypeError(errors.say(f"loftq at {path!r}", "a dense weight is required", "a Quantized leaf", remedy))
    adapter: Any = None
    stored: Params = {}
    for _ in tqdm(range(iterations), desc="loftq", unit="iteration", disable=None if progress is None else not progress):
        stored = _stored(net, params, entries, adapter, format)
        adapter = net.init(stored, seed, weights=params)
    return stored, adapter


def _weights(entries: list[tuple[int, Entry]]) -> Iterator[tuple[str, str]]:
    return ((path, site.weight) for _, e in entries for path, site in e.sites.items())


def _stored(net: Net, params: Params, entries: list[tuple[int, Entry]], adapter: Any, format: Format) -> Params:
    """Returns params in which every adapted weight, less the update, is stored in the format."""
    out = dict(params)
    for i, entry in entries:
        for path, base in net.bases(entry, params).items():
            matrix = base.weight
            if adapter is not None:
                one: Adapter = as_tuple(adapter)[i]
                matrix = matrix - entry.method.delta(entry.leaves(one, path), base)  # type: ignore[attr-defined]
            weight = base.kind.stored(matrix, base.site.shape).to(dense(params[base.site.weight]).dtype)
            try:
                out[base.site.weight] = format.requant(weight)
            except ValueError as e:
                raise type(e)(f"loftq at {path!r}: {e}") from e
    return out
