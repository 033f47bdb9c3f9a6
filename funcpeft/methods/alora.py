r"""aLoRA: activated low-rank adaptation, which acts from an invocation sequence on.

.. math:: y_t = W x_t + b + [t \ge T - o] \, s B A x_t

A (r, in), B (out, r), s: as in LoRA; t: the position of a token among the T of a row; o: the row's offset, counted from its
end. Positions before the last occurrence of ``alora_invocation_tokens`` in the row are those of the base, so that its key-value
cache serves them; a row in which the sequence does not occur is the base's throughout, o = 0. Positions depend on the ids of
the call, so there is no merged form.

Offsets are the value ``alora_offsets`` (rows,) of a call. A call of a decoder on ``input_ids`` finds them by itself;
``net(..., context=Context(values={"alora_offsets": o}))`` gives others, and must where a model gets no ids, or gets a row in
several calls with a cache. ``generate`` finds them once, in the ids it starts from, and the positions stay where they
are, with a cache (where peft 0.21 agrees) and without (where peft keeps counting from the end, so that the start drifts).
A layer whose input has two axes, with several entries per row on the first, takes those for the row's tokens.

References:
    Greenewald et al., Activated LoRA: Fine-tuned LLMs for Intrinsics, 2025, arXiv 2504.12397, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.context import Context
from funcpeft.method import Method
from funcpeft.methods.lora import LoRA
from funcpeft.tree import Leaves
from funcpeft.weights import Base

Call = Callable[..., Any]


def last_offsets(ids: Tensor, sequence: tuple[int, ...]) -> Tensor:
    """Returns, for every row of ids, how far from its end a sequence occurs last; 0 where it does not occur.

    Args:
        ids: ``(rows, length)``.
        sequence: The ids to look for, at least one.
    """
    rows, length = ids.shape
    starts = length - len(sequence) + 1
    if starts < 1:
        return ids.new_zeros(rows)
    hit = torch.ones_like(ids[:, :starts], dtype=torch.bool)
    for i, token in enumerate(sequence):
        hit = hit & (ids[:, i : i + starts] == token)
    back = length - torch.arange(starts, device=ids.device, dtype=ids.dtype)
    return torch.where(hit, back, length + 1).amin(-1).remainder(length + 1)


def active(offsets: Tensor, x: Tensor) -> Tensor:
    """Returns which positions of a layer's input the update acts on, with a last axis of size 1.

    Args:
        offsets: ``(rows,)``, counted from the end of a row.
        x: ``(entries, ..., T, in)`` with one or several entries per row, or ``(rows * T, in)``.
    """
    own = x.shape[0] // offsets.shape[0]
    count = own if x.ndim == 2 else x.shape[-2]
    position = torch.arange(count, device=x.device)
    mask = position >= count - offsets[:, None]
    if x.ndim == 2:
        return mask.reshape(-1, 1)
    mask = mask[:, None].expand(-1, own, -1).flatten(0, 1)
    return mask.reshape(mask.shape[0], *(1 for _ in x.shape[1:-2]), count, 1)


@dataclass(frozen=True, kw_only=True)
class aLoRA(LoRA):
    """Low-rank adaptation of the positions from an invocation sequence on.

    The fields not named here are ``LoRA``'s.

    Args:
        alora_invocation_tokens: The ids that activate the update; must be given.
    """

    alora_invocation_tokens: tuple[int, ...] | list[int] | None = None

    peft_switch: ClassVar[str] = "alora_invocation_tokens"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed"})
    context_names: ClassVar[tuple[str, ...]] = ("alora_offsets",)
    additive: ClassVar[bool] = False
    merge = Method.merge
    unmerge = Method.unmerge

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.alora_invocation_tokens
        ids = bool(given) and all(i >= 0 for i in given)
        self.require(ids, "alora_invocation_tokens", "at least one token id", given)

    @classmethod
    def examples(cls) -> tuple[aLoRA, ...]:
        """Returns one with dropout."""
        return (cls(r=2, lora_alpha=3, lora_dropout=0.25, alora_invocation_tokens=(5, 7)),)

    def sample_values(self, rows: int) -> dict[str, Tensor]:
        return {"alora_offsets": (torch.arange(rows) + 2) % 5}

    def check_model(self, facts: Any) -> None:
        """Raises ``ValueError`` if the model does not fit; reads its config only."""
        rule, remedy = "offsets are counted in the one sequence of a decoder", "use LoRA"
        if facts.encoder_decoder:
            raise ValueError(errors.say(self.label, rule, f"{facts.name} has an encoder too", remedy))

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        offsets = self._offsets(base, x, context)
        update = self.product(leaves, base, context.dropout(x, self.lora_dropout))
        return base(x) + torch.where(active(offsets, x), update, 0.0)

    def _offsets(self, base: Base, x: Tensor, context: Context) -> Tensor:
        offsets = context.value("alora_offsets")
        rule = "alora_offsets must be integers (rows,), one for each row of the input"
        whole = not (offsets.is_floating_point() or offsets.is_complex() or offsets.dtype is torch.bool)
        fits = whole and offsets.ndim == 1 and len(offsets) and x.ndim > 1 and not x.shape[0] % len(offsets)
        self.require_at(bool(fits), base, rule, f"{offsets.dtype} {tuple(offsets.shape)} with input {tuple(x.shape)}")
        return offsets

    def wrap(self, leaves: Leaves, call: Call, kind: str, facts: Any) -> Call:
        """Returns the call with the offsets that its ids say."""
        if "alora_offsets" in facts.values and kind == "forward":
            return call

        def forward(**inputs: Any) -> Any:
            return call(values={"alora_offsets": self._found(inputs.get("input_ids"))}, **inputs)

        def generate(**inputs: Any) -> Any:
            ids = inputs.get("input_ids", inputs.get("inputs"))
            offsets = facts.values.get("alora_offsets")
            if offsets is None:
                offsets = self._found(ids)
            return call(**{**inputs, "forwards": (*inputs.get("forwards", ()), stepper(offsets, _length(inputs), facts))})

        return generate if kind == "generate" else forward

    def _found(self, ids: Tensor | None) -> Tensor:
        if ids is None:
            rule, remedy = "a call needs input_ids", "pass context=Context(values={'alora_offsets': tensor})"
            raise ValueError(errors.say(self.label, rule, None, remedy))
        assert self.alora_invocation_tokens is not None
        return last_offsets(ids, tuple(self.alora_invocation_tokens))


def stepper(offsets: Tensor, length: int, facts: Any) -> Callable[..., Any]:
    """Returns what runs around every forward of ``generate``, and keeps positions where they were at the start.

    Args:
        offsets: ``(rows,)``, counted from the end of the ids that ``generate`` was given; 0 for a row of the base.
        length: Number of these ids.
        facts: Facts of the model.
    """

    def step(forward: Call, **inputs: Any) -> Any:
        here = _length(inputs)
        held = facts.held(inputs.get("past_key_values"))
        if not held and here < length:  # a model with a state of another kind gets new tokens alone
            held = length
        return forward(values={"alora_offsets": torch.where(offsets > 0, offsets + held + here - length, 0)}, **inputs)

    return step


def _length(inputs: Any) -> int:
    """Returns the number of positions of a call's input."""
    names = ("input_ids", "inputs", "inputs_embeds")
    return next((inputs[name].shape[1] for name in names if inputs.get(name) is not None), 0)
